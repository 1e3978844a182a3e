//! ClientHellos, answered without keeping anything about who sent them (RFC 6347 §4.2.1, abuse.md D).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use turn_core::wire::client_hello::ClientHello;

/// A cookie is made under one secret for this long, and accepted for as long again.
const SLOT: Duration = Duration::from_secs(60);
/// Bytes of a cookie: nobody guesses 128 bits.
const COOKIE: usize = 16;
/// Bytes of a HelloVerifyRequest: record header, handshake header, version, length, cookie. The shortest ClientHello
/// has 60 up to its cookie, so an answer is never longer than what it answers.
pub(super) const VERIFY: usize = 13 + 12 + 2 + 1 + COOKIE;

/// Makes and checks cookies. All it knows is a secret.
pub(super) struct Cookies {
    secret: [u8; 64],
    began: Instant,
}

impl Cookies {
    pub(super) fn new(secret: [u8; 64], began: Instant) -> Self {
        Self { secret, began }
    }

    /// Whether the ClientHello brings a cookie that was made for it and its sender.
    pub(super) fn verify(&self, client: SocketAddr, server: SocketAddr, hello: &ClientHello<'_>, now: Instant) -> bool {
        let slot = self.slot(now);
        hello.cookie.len() == COOKIE
            && [Some(slot), slot.checked_sub(1)]
                .into_iter()
                .flatten()
                .any(|slot| self.mac(client, server, hello, slot).verify_truncated_left(hello.cookie).is_ok())
    }

    /// HelloVerifyRequest (RFC 6347 §4.2.1).
    pub(super) fn request(
        &self,
        client: SocketAddr,
        server: SocketAddr,
        hello: &ClientHello<'_>,
        now: Instant,
    ) -> [u8; VERIFY] {
        let mut packet = [0; VERIFY];
        // The version is DTLS 1.0 whatever is negotiated later; the record takes the sequence number of what it answers.
        packet[..3].copy_from_slice(&[22, 0xFE, 0xFF]);
        packet[5..11].copy_from_slice(&hello.record_sequence.to_be_bytes()[2..]);
        packet[12] = (VERIFY - 13) as u8;
        // So does the message: a client that gets a second one has sent its second.
        packet[13..17].copy_from_slice(&[3, 0, 0, (VERIFY - 25) as u8]);
        packet[17..19].copy_from_slice(&hello.message_sequence.to_be_bytes());
        packet[24] = (VERIFY - 25) as u8;
        packet[25..28].copy_from_slice(&[0xFE, 0xFF, COOKIE as u8]);
        let cookie = self.mac(client, server, hello, self.slot(now)).finalize().into_bytes();
        packet[28..].copy_from_slice(&cookie[..COOKIE]);
        packet
    }

    fn slot(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_secs() / SLOT.as_secs()
    }

    /// RFC 6347 §4.2.1 wants the client's parameters in it. Cipher suites and compression methods stand behind the
    /// cookie, where a fragment may have ended.
    fn mac(&self, client: SocketAddr, server: SocketAddr, hello: &ClientHello<'_>, slot: u64) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new(&self.secret.into());
        mac.update(&slot.to_be_bytes());
        for address in [client, server] {
            match address.ip() {
                IpAddr::V4(ip) => mac.update(&ip.to_ipv6_mapped().octets()),
                IpAddr::V6(ip) => mac.update(&ip.octets()),
            }
            mac.update(&address.port().to_be_bytes());
        }
        mac.update(hello.parameters);
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("literal")
    }

    #[test]
    fn a_cookie_is_good_for_its_client_and_its_time() {
        let began = Instant::now();
        let cookies = Cookies::new([1; 64], began);
        let (client, server) = (address("192.0.2.1:5000"), address("198.51.100.7:443"));
        let parameters = [7; 35];
        let hello = ClientHello { record_sequence: 5, message_sequence: 0, parameters: &parameters, cookie: &[] };
        let made = began + Duration::from_secs(59);
        let packet = cookies.request(client, server, &hello, made);
        assert_eq!(packet[..13], [22, 0xFE, 0xFF, 0, 0, 0, 0, 0, 0, 0, 5, 0, 31]);
        assert_eq!(packet[13..28], [3, 0, 0, 19, 0, 0, 0, 0, 0, 0, 0, 19, 0xFE, 0xFF, 16]);
        let again = ClientHello { message_sequence: 1, cookie: &packet[28..], ..hello };
        let late = began + Duration::from_secs(119);
        assert!(cookies.verify(client, server, &again, made) && cookies.verify(client, server, &again, late));

        let other = [8; 35];
        let mut broken = packet;
        broken[43] ^= 1;
        let refused = [
            ("another port", address("192.0.2.1:5001"), server, again, late),
            ("another address", address("192.0.2.2:5000"), server, again, late),
            ("another server", client, address("198.51.100.7:3478"), again, late),
            ("another random", client, server, ClientHello { parameters: &other, ..again }, late),
            ("another cookie", client, server, ClientHello { cookie: &broken[28..], ..again }, late),
            ("less of it", client, server, ClientHello { cookie: &packet[28..40], ..again }, late),
            ("none", client, server, hello, late),
            ("too old", client, server, again, late + Duration::from_secs(1)),
        ];
        for (what, client, server, hello, now) in refused {
            assert!(!cookies.verify(client, server, &hello, now), "{what}");
        }
        assert!(!Cookies::new([2; 64], began).verify(client, server, &again, made), "another secret");
    }

    #[test]
    fn the_second_answer_has_the_number_of_the_second_hello() {
        let cookies = Cookies::new([1; 64], Instant::now());
        let hello = ClientHello {
            record_sequence: 0x1_0203_0405_0607,
            message_sequence: 2,
            parameters: &[7; 35],
            cookie: b"old",
        };
        let packet = cookies.request(address("[::1]:1"), address("[::1]:2"), &hello, Instant::now());
        assert_eq!((&packet[5..11], &packet[17..19]), (&[2, 3, 4, 5, 6, 7][..], &[0, 2][..]));
    }
}
