//! `FIRST-LAST` as the networks that cover it and nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Reads an address, a range or a network; each network as `ADDRESS/PREFIX`. None where it is neither.
pub(super) fn networks(text: &str) -> Option<Vec<String>> {
    if let Some((address, prefix)) = text.split_once('/') {
        let (address, prefix): (IpAddr, u32) = (address.parse().ok()?, prefix.parse().ok()?);
        return (prefix <= bits(address)).then(|| vec![format!("{address}/{prefix}")]);
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (IpAddr, IpAddr) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    if first.is_ipv4() != last.is_ipv4() || first > last {
        return None;
    }
    let bits = bits(first);
    let (mut at, end) = (number(first), number(last));
    let mut all = Vec::new();
    loop {
        // As large as it begins and ends within.
        let aligned = at.trailing_zeros().min(bits);
        let size = (0..=aligned).rev().find(|size| at.checked_add(mask(*size)).is_some_and(|top| top <= end))?;
        all.push(format!("{}/{}", address(at, first.is_ipv4()), bits - size));
        let top = at + mask(size);
        if top == end {
            return Some(all);
        }
        at = top + 1;
    }
}

fn bits(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    match u32::try_from(number) {
        Ok(number) if v4 => Ipv4Addr::from(number).into(),
        _ => Ipv6Addr::from(number).into(),
    }
}

/// The low `size` bits.
fn mask(size: u32) -> u128 {
    1_u128.checked_shl(size).map_or(u128::MAX, |bit| bit - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_covered_and_nothing_else() {
        let cases: &[(&str, Option<&[&str]>)] = &[
            ("192.0.2.1", Some(&["192.0.2.1/32"])),
            ("10.0.0.0-10.255.255.255", Some(&["10.0.0.0/8"])),
            ("10.0.0.1-10.0.0.6", Some(&["10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/31", "10.0.0.6/32"])),
            ("0.0.0.0-255.255.255.255", Some(&["0.0.0.0/0"])),
            ("::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some(&["::/0"])),
            ("2001:db8::-2001:db8::ff", Some(&["2001:db8::/120"])),
            ("10.0.0.0/8", Some(&["10.0.0.0/8"])),
            ("10.0.0.0/33", None),
            ("10.0.0.2-10.0.0.1", None),
            ("10.0.0.1-::1", None),
            ("everywhere", None),
        ];
        for (text, expected) in cases {
            let expected = expected.map(|all| all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>());
            assert_eq!(networks(text), expected, "{text}");
        }
    }
}
