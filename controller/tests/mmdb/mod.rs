//! Writes small MaxMind databases (format 2.0) that place IPv4 networks.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// A database in which each network (address, prefix length) lies at a latitude and longitude.
pub(crate) fn database(networks: &[(&str, u8, f64, f64)]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut tree: Vec<[Record; 2]> = vec![[Record::Empty; 2]];
    for (address, prefix, latitude, longitude) in networks {
        let bits = address.parse::<Ipv4Addr>().expect("literal").to_bits();
        let record = Record::Data(data.len());
        let degrees = BTreeMap::from([("latitude", *latitude), ("longitude", *longitude)]);
        map(&mut data, 1);
        string(&mut data, "location");
        map(&mut data, degrees.len());
        for (name, value) in degrees {
            string(&mut data, name);
            data.push(3 << 5 | 8);
            data.extend(value.to_be_bytes());
        }
        let mut node = 0;
        for depth in 0..*prefix {
            let side = (bits >> (31 - depth) & 1) as usize;
            if depth + 1 == *prefix {
                tree[node][side] = record;
            } else if let Record::Node(next) = tree[node][side] {
                node = next;
            } else {
                tree.push([Record::Empty; 2]);
                tree[node][side] = Record::Node(tree.len() - 1);
                node = tree.len() - 1;
            }
        }
    }
    let nodes = tree.len();
    let mut bytes = Vec::new();
    for record in tree.into_iter().flatten() {
        let value = match record {
            Record::Empty => nodes,
            Record::Node(node) => node,
            Record::Data(offset) => nodes + 16 + offset,
        };
        bytes.extend(&u32::try_from(value).expect("a small tree").to_be_bytes()[1..]);
    }
    bytes.extend([0; 16]);
    bytes.extend(data);
    bytes.extend(b"\xAB\xCD\xEFMaxMind.com");
    map(&mut bytes, 9);
    number(&mut bytes, "binary_format_major_version", 5, 2);
    number(&mut bytes, "binary_format_minor_version", 5, 0);
    number(&mut bytes, "build_epoch", 9, 1_700_000_000);
    string(&mut bytes, "database_type");
    string(&mut bytes, "Test-City");
    string(&mut bytes, "description");
    map(&mut bytes, 0);
    number(&mut bytes, "ip_version", 5, 4);
    string(&mut bytes, "languages");
    // An array of nothing: extended type 11.
    bytes.extend([0, 4]);
    number(&mut bytes, "node_count", 6, nodes as u64);
    number(&mut bytes, "record_size", 5, 24);
    bytes
}

#[derive(Clone, Copy)]
enum Record {
    Empty,
    Node(usize),
    Data(usize),
}

fn map(bytes: &mut Vec<u8>, len: usize) {
    bytes.push(7 << 5 | u8::try_from(len).expect("short"));
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.push(2 << 5 | u8::try_from(text.len()).expect("short"));
    bytes.extend(text.as_bytes());
}

/// A name and an unsigned integer of a type: 5 is 16 bits, 6 is 32, 9 is 64.
fn number(bytes: &mut Vec<u8>, name: &str, kind: u8, value: u64) {
    string(bytes, name);
    let digits: Vec<u8> = value.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).collect();
    let len = u8::try_from(digits.len()).expect("short");
    if kind > 7 {
        bytes.extend([len, kind - 7]);
    } else {
        bytes.push(kind << 5 | len);
    }
    bytes.extend(digits);
}
