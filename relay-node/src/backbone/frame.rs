//! The frames of a link (pure). One QUIC datagram is one frame, and each says everything it means: nothing refers to an
//! earlier frame or to a table of the other end, so a relay that has restarted misunderstands nothing.
//!
//! The first byte is the version (upper four bits) and the kind. Integers are big-endian.

use std::net::{IpAddr, SocketAddr};

use bytes::{BufMut, BytesMut};
use turn_core::IpMeta;

use super::members::NodeTag;

/// Version of the frames this relay writes. Another one is dropped and counted.
const VERSION: u8 = 1;

const DATA: u8 = 1;
const PART: u8 = 2;
const VIA: u8 = 3;
const RELAYED: u8 = 4;
const INGRESS: u8 = 5;
const INGRESS_REPLY: u8 = 6;
const PROBE: u8 = 7;
const PROBE_ANSWER: u8 = 8;
const DISTANCES: u8 = 9;

/// Flags of a frame with two addresses.
const FIRST_IS_V6: u8 = 1;
const SECOND_IS_V6: u8 = 2;
const DONT_FRAGMENT: u8 = 4;

/// Bytes before those of a part.
pub(super) const PART_HEADER: usize = 7;
/// Bytes before a packet that goes over a third member.
pub(super) const VIA_HEADER: usize = 9;
/// Nodes in one frame of distances.
pub(super) const MOST_DISTANCES: usize = 72;
const DISTANCE: usize = 14;

/// One frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Frame<'a> {
    /// From a relayed address of the sender to one of the receiver.
    Data { source: SocketAddr, destination: SocketAddr, ip: IpMeta, payload: &'a [u8] },
    /// A piece of a frame that is longer than a datagram: number `index` of `count`.
    Part { message: u32, index: u8, count: u8, bytes: &'a [u8] },
    /// A packet of the sender's own connection to a third member, to be passed on to it.
    Via { to: NodeTag, packet: &'a [u8] },
    /// Such a packet, passed on.
    Relayed { from: NodeTag, packet: &'a [u8] },
    /// A client's packet that arrived at the sender, at its address `server`.
    Ingress { client: SocketAddr, server: SocketAddr, ip: IpMeta, payload: &'a [u8] },
    /// The answer to it.
    IngressReply { client: SocketAddr, server: SocketAddr, ip: IpMeta, payload: &'a [u8] },
    /// Asks for an answer.
    Probe { number: u32 },
    /// The answer.
    ProbeAnswer { number: u32 },
    /// How far others are from the sender.
    Distances(Distances<'a>),
}

/// Why a datagram is no frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum NoFrame {
    /// Of a version or kind that this relay does not know: a newer one may.
    Unknown,
    /// It breaks the rules of its kind.
    Malformed,
}

/// Which of the frames with two addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum PacketKind {
    /// First address: source, second: destination.
    Data,
    /// First address: client, second: server.
    Ingress,
    /// As [`PacketKind::Ingress`].
    IngressReply,
}

/// Writes what stands before the payload of a frame with two addresses: 15 bytes for IPv4, 39 for IPv6.
pub(super) fn put_packet(kind: PacketKind, first: SocketAddr, second: SocketAddr, ip: IpMeta, into: &mut BytesMut) {
    into.put_u8(first_byte(match kind {
        PacketKind::Data => DATA,
        PacketKind::Ingress => INGRESS,
        PacketKind::IngressReply => INGRESS_REPLY,
    }));
    into.put_u8(ip.dscp_ecn);
    let flag = |set, flag| if set { flag } else { 0 };
    into.put_u8(
        flag(first.is_ipv6(), FIRST_IS_V6)
            | flag(second.is_ipv6(), SECOND_IS_V6)
            | flag(ip.dont_fragment, DONT_FRAGMENT),
    );
    for address in [first, second] {
        match address.ip() {
            IpAddr::V4(ip) => into.put_slice(&ip.octets()),
            IpAddr::V6(ip) => into.put_slice(&ip.octets()),
        }
        into.put_u16(address.port());
    }
}

/// Writes what stands before the bytes of a part.
pub(super) fn put_part(message: u32, index: u8, count: u8, into: &mut BytesMut) {
    into.put_u8(first_byte(PART));
    into.put_u32(message);
    into.put_u8(index);
    into.put_u8(count);
}

/// Writes what stands before a packet to a third member.
pub(super) fn put_via(to: NodeTag, into: &mut BytesMut) {
    into.put_u8(first_byte(VIA));
    into.put_u64(to.0);
}

/// Writes what stands before a packet that is passed on.
pub(super) fn put_relayed(from: NodeTag, into: &mut BytesMut) {
    into.put_u8(first_byte(RELAYED));
    into.put_u64(from.0);
}

/// Writes a probe.
pub(super) fn put_probe(number: u32, into: &mut BytesMut) {
    into.put_u8(first_byte(PROBE));
    into.put_u32(number);
}

/// Writes the answer to a probe.
pub(super) fn put_probe_answer(number: u32, into: &mut BytesMut) {
    into.put_u8(first_byte(PROBE_ANSWER));
    into.put_u32(number);
}

/// Writes distances, at most [`MOST_DISTANCES`].
pub(super) fn put_distances(distances: impl Iterator<Item = Distance>, into: &mut BytesMut) {
    into.put_u8(first_byte(DISTANCES));
    for distance in distances.take(MOST_DISTANCES) {
        into.put_u64(distance.node.0);
        into.put_u32(distance.rtt_micros);
        into.put_u16(distance.loss_permille);
    }
}

/// Reads a datagram.
pub(super) fn read(datagram: &[u8]) -> Result<Frame<'_>, NoFrame> {
    let (first, rest) = datagram.split_first().ok_or(NoFrame::Malformed)?;
    if first >> 4 != VERSION {
        return Err(NoFrame::Unknown);
    }
    match first & 0xF {
        DATA => {
            let (source, destination, ip, payload) = packet(rest)?;
            Ok(Frame::Data { source, destination, ip, payload })
        }
        INGRESS => {
            let (client, server, ip, payload) = packet(rest)?;
            Ok(Frame::Ingress { client, server, ip, payload })
        }
        INGRESS_REPLY => {
            let (client, server, ip, payload) = packet(rest)?;
            Ok(Frame::IngressReply { client, server, ip, payload })
        }
        PART => {
            let (message, rest) = take::<4>(rest)?;
            let ([index, count], bytes) = take::<2>(rest)?;
            if index >= count || count < 2 {
                return Err(NoFrame::Malformed);
            }
            Ok(Frame::Part { message: u32::from_be_bytes(message), index, count, bytes })
        }
        VIA => {
            let (to, packet) = take::<8>(rest)?;
            Ok(Frame::Via { to: NodeTag(u64::from_be_bytes(to)), packet })
        }
        RELAYED => {
            let (from, packet) = take::<8>(rest)?;
            Ok(Frame::Relayed { from: NodeTag(u64::from_be_bytes(from)), packet })
        }
        PROBE => Ok(Frame::Probe { number: number(rest)? }),
        PROBE_ANSWER => Ok(Frame::ProbeAnswer { number: number(rest)? }),
        DISTANCES if rest.len() % DISTANCE == 0 && rest.len() / DISTANCE <= MOST_DISTANCES => {
            Ok(Frame::Distances(Distances(rest)))
        }
        DISTANCES => Err(NoFrame::Malformed),
        _ => Err(NoFrame::Unknown),
    }
}

/// What a relay knows of its link to another one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Distance {
    pub(super) node: NodeTag,
    pub(super) rtt_micros: u32,
    pub(super) loss_permille: u16,
}

/// Distances as they stand in a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Distances<'a>(&'a [u8]);

impl Distances<'_> {
    pub(super) fn iter(&self) -> impl Iterator<Item = Distance> {
        self.0.chunks_exact(DISTANCE).filter_map(|entry| {
            let (node, entry) = take::<8>(entry).ok()?;
            let (rtt, entry) = take::<4>(entry).ok()?;
            let (loss, _) = take::<2>(entry).ok()?;
            Some(Distance {
                node: NodeTag(u64::from_be_bytes(node)),
                rtt_micros: u32::from_be_bytes(rtt),
                loss_permille: u16::from_be_bytes(loss).min(1000),
            })
        })
    }
}

fn first_byte(kind: u8) -> u8 {
    VERSION << 4 | kind
}

fn take<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), NoFrame> {
    bytes.split_first_chunk::<N>().map(|(taken, rest)| (*taken, rest)).ok_or(NoFrame::Malformed)
}

fn number(bytes: &[u8]) -> Result<u32, NoFrame> {
    // What a later version may add stands behind it.
    Ok(u32::from_be_bytes(take::<4>(bytes)?.0))
}

fn packet(bytes: &[u8]) -> Result<(SocketAddr, SocketAddr, IpMeta, &[u8]), NoFrame> {
    let ([dscp_ecn, flags], rest) = take::<2>(bytes)?;
    if flags & !(FIRST_IS_V6 | SECOND_IS_V6 | DONT_FRAGMENT) != 0 {
        return Err(NoFrame::Malformed);
    }
    let (first, rest) = address(rest, flags & FIRST_IS_V6 != 0)?;
    let (second, payload) = address(rest, flags & SECOND_IS_V6 != 0)?;
    let ip = IpMeta { dscp_ecn, ttl: 0, dont_fragment: flags & DONT_FRAGMENT != 0 };
    Ok((first, second, ip, payload))
}

fn address(bytes: &[u8], is_v6: bool) -> Result<(SocketAddr, &[u8]), NoFrame> {
    let (ip, rest) = if is_v6 {
        let (ip, rest) = take::<16>(bytes)?;
        // One form for one address: what is checked against lists must not slip through in another.
        (IpAddr::from(ip).to_canonical(), rest)
    } else {
        let (ip, rest) = take::<4>(bytes)?;
        (IpAddr::from(ip), rest)
    };
    let (port, rest) = take::<2>(rest)?;
    Ok((SocketAddr::new(ip, u16::from_be_bytes(port)), rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(write: impl FnOnce(&mut BytesMut), payload: &[u8]) -> BytesMut {
        let mut bytes = BytesMut::new();
        write(&mut bytes);
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn frames_read_as_they_were_written() {
        let v4: SocketAddr = "192.0.2.1:49152".parse().expect("an address");
        let v6: SocketAddr = "[2001:db8::1]:50000".parse().expect("an address");
        let ip = IpMeta { dscp_ecn: 0xB9, ttl: 0, dont_fragment: true };
        for (source, destination, length) in [(v4, v4, 15), (v4, v6, 27), (v6, v4, 27), (v6, v6, 39)] {
            let bytes = written(|into| put_packet(PacketKind::Data, source, destination, ip, into), b"media");
            assert_eq!(bytes.len(), length + 5);
            assert_eq!(read(&bytes), Ok(Frame::Data { source, destination, ip, payload: b"media" }));
        }
        let plain = IpMeta::default();
        let bytes = written(|into| put_packet(PacketKind::Ingress, v4, v6, plain, into), b"");
        assert_eq!(read(&bytes), Ok(Frame::Ingress { client: v4, server: v6, ip: plain, payload: b"" }));
        let bytes = written(|into| put_packet(PacketKind::IngressReply, v6, v4, plain, into), b"x");
        assert_eq!(read(&bytes), Ok(Frame::IngressReply { client: v6, server: v4, ip: plain, payload: b"x" }));
        let bytes = written(|into| put_part(7, 1, 2, into), b"half");
        assert_eq!(bytes.len(), PART_HEADER + 4);
        assert_eq!(read(&bytes), Ok(Frame::Part { message: 7, index: 1, count: 2, bytes: b"half" }));
        let tag = NodeTag::of("eu-1");
        let bytes = written(|into| put_via(tag, into), b"quic");
        assert_eq!(bytes.len(), VIA_HEADER + 4);
        assert_eq!(read(&bytes), Ok(Frame::Via { to: tag, packet: b"quic" }));
        let bytes = written(|into| put_relayed(tag, into), b"quic");
        assert_eq!(read(&bytes), Ok(Frame::Relayed { from: tag, packet: b"quic" }));
        let bytes = written(|into| put_probe(9, into), b"added by a later version");
        assert_eq!(read(&bytes), Ok(Frame::Probe { number: 9 }));
        let bytes = written(|into| put_probe_answer(9, into), b"");
        assert_eq!(read(&bytes), Ok(Frame::ProbeAnswer { number: 9 }));
        let distances: Vec<_> =
            (0..3).map(|node| Distance { node: NodeTag(node), rtt_micros: 80_000, loss_permille: 20 }).collect();
        let bytes = written(|into| put_distances(distances.iter().copied(), into), b"");
        let Ok(Frame::Distances(read)) = read(&bytes) else { panic!("distances") };
        assert_eq!(read.iter().collect::<Vec<_>>(), distances);
    }

    #[test]
    fn the_bytes_are_these() {
        // Frozen: relays of two versions talk to each other while a cluster is upgraded (P12).
        let source = "192.0.2.1:49152".parse().expect("an address");
        let destination = "[2001:db8::2]:50000".parse().expect("an address");
        let ip = IpMeta { dscp_ecn: 0xB8, ttl: 0, dont_fragment: true };
        let data = written(|into| put_packet(PacketKind::Data, source, destination, ip, into), b"m");
        let expected = b"\x11\xb8\x06\xc0\x00\x02\x01\xc0\x00\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x02\xc3\x50m";
        assert_eq!(&data[..], expected);
        assert_eq!(&written(|into| put_part(0x0102, 1, 2, into), b"h")[..], b"\x12\0\0\x01\x02\x01\x02h");
        assert_eq!(&written(|into| put_via(NodeTag(5), into), b"q")[..], b"\x13\0\0\0\0\0\0\0\x05q");
        assert_eq!(&written(|into| put_relayed(NodeTag(5), into), b"q")[..], b"\x14\0\0\0\0\0\0\0\x05q");
        assert_eq!(written(|into| put_packet(PacketKind::Ingress, source, source, ip, into), b"")[0], 0x15);
        assert_eq!(written(|into| put_packet(PacketKind::IngressReply, source, source, ip, into), b"")[0], 0x16);
        assert_eq!(&written(|into| put_probe(3, into), b"")[..], b"\x17\0\0\0\x03");
        assert_eq!(&written(|into| put_probe_answer(3, into), b"")[..], b"\x18\0\0\0\x03");
        let distance = Distance { node: NodeTag(5), rtt_micros: 256, loss_permille: 7 };
        let distances = written(|into| put_distances(std::iter::once(distance), into), b"");
        assert_eq!(&distances[..], b"\x19\0\0\0\0\0\0\0\x05\0\0\x01\0\0\x07");
    }

    #[test]
    fn what_is_not_known_is_told_from_what_is_wrong() {
        for (bytes, expected) in [
            (&b""[..], NoFrame::Malformed),
            (b"\x21", NoFrame::Unknown),
            (b"\x00", NoFrame::Unknown),
            (b"\x1f", NoFrame::Unknown),
            (b"\x11", NoFrame::Malformed),
            (b"\x11\0\0\0\0\0\0\0\0\0\0\0\0\0", NoFrame::Malformed),
            (b"\x11\0\x80\0\0\0\0\0\0\0\0\0\0\0\0", NoFrame::Malformed),
            (b"\x12\0\0\0\0\x02\x02", NoFrame::Malformed),
            (b"\x12\0\0\0\0\0\x01", NoFrame::Malformed),
            (b"\x13\0\0", NoFrame::Malformed),
            (b"\x17\0\0", NoFrame::Malformed),
            (b"\x19\0", NoFrame::Malformed),
        ] {
            assert_eq!(read(bytes), Err(expected), "{bytes:x?}");
        }
    }

    #[test]
    fn an_ipv4_address_in_ipv6_clothes_is_read_as_what_it_is() {
        let mapped = "[::ffff:192.0.2.1]:49152".parse().expect("an address");
        let bytes = written(|into| put_packet(PacketKind::Data, mapped, mapped, IpMeta::default(), into), b"");
        let Ok(Frame::Data { source, destination, .. }) = read(&bytes) else { panic!("data") };
        assert!(source.is_ipv4() && destination.is_ipv4());
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u8..16) {
            let _ = read(&bytes);
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = 0x10 | kind;
            }
            if let Ok(Frame::Distances(distances)) = read(&bytes) {
                let _ = distances.iter().count();
            }
        }
    }
}
