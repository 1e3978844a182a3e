//! The long-term credential mechanism (RFC 8489 §9.2.4), in its order.

use std::hint::black_box;

use super::reply::Request;
use super::{Server, Verdict};
use crate::credential::{self, LongTermKey};
use crate::nonce::{self, Freshness};
use crate::wire::attribute::{Nonce, Realm, Username};
use crate::wire::{AttributeType, ErrorCode, Method};

/// RFC 8489 §14.3: fewer than 509 bytes.
const MAX_USERNAME: usize = 508;
/// RFC 8489 §14.9 and §14.10: 127 characters, 763 bytes of which must be read.
const MAX_TEXT: usize = 763;

/// Who made an authenticated request.
pub(super) struct User<'a> {
    /// USERNAME, opaque.
    pub(super) name: &'a [u8],
    /// What answers are signed with.
    pub(super) key: LongTermKey,
}

/// Why a request is not served.
pub(super) enum Refusal {
    /// 401, with REALM and a fresh NONCE.
    Unauthenticated,
    /// 400, bare.
    BadRequest,
    /// 438, with REALM and a fresh NONCE. The user is known, so it is signed.
    StaleNonce(LongTermKey),
}

impl Server {
    /// Whether requests can be judged: otherwise silence, because any answer might be wrong (promise P5).
    pub(super) fn can_authenticate(&self) -> bool {
        let settings = &self.settings;
        let users = !settings.rest_secrets.0.is_empty() || !settings.static_users.is_empty();
        users && !settings.realm.is_empty() && !settings.nonce_keys.0.is_empty()
    }

    /// The checks of RFC 8489 §9.2.4. An unknown user costs the same work as a wrong password and gets the same answer.
    pub(super) fn authenticate<'a>(&self, request: &Request<'a>) -> Result<User<'a>, Refusal> {
        let settings = &*self.settings;
        let message = &request.message;
        // MESSAGE-INTEGRITY-SHA256 alone does not authenticate: no nonce of ours offers another algorithm.
        if !message.contains(AttributeType::MESSAGE_INTEGRITY) {
            return Err(Refusal::Unauthenticated);
        }
        let (Ok(Some(Username(name))), Ok(Some(Realm(realm))), Ok(Some(Nonce(nonce)))) =
            (message.attribute(), message.attribute(), message.attribute())
        else {
            return Err(Refusal::BadRequest);
        };
        if name.len() > MAX_USERNAME || realm.len() > MAX_TEXT || nonce.len() > MAX_TEXT {
            return Err(Refusal::BadRequest);
        }
        // A nonce with the bit cannot be ours, so what was offered with it cannot match.
        if nonce::claims_password_algorithms(nonce)
            && (message.contains(AttributeType::PASSWORD_ALGORITHM)
                || message.contains(AttributeType::PASSWORD_ALGORITHMS))
        {
            return Err(Refusal::BadRequest);
        }

        let unix_seconds = request.now.wall / 1000;
        // A ConnectionBind claims what its user's allocation has, on a five-tuple of its own (RFC 6062 §4.3).
        let holder = message.method() == Method::ConnectionBind
            || self.table.by_five_tuple(&request.from).is_some_and(|slot| *self.table.get(slot).username == *name);
        let mut keys = if holder {
            credential::candidate_keys_of_holder(settings, name)
        } else {
            credential::candidate_keys(settings, name, unix_seconds)
        };
        let known = !keys.is_empty() && realm == settings.realm.as_bytes();
        if keys.is_empty() {
            keys.push(credential::long_term_key(name, &settings.realm, b"nobody's password"));
        }
        // Every key is tried, and tried before `known` is looked at.
        let mut matching = None;
        for key in &keys {
            if black_box(message.verify_integrity(key)) {
                matching = Some(*key);
            }
        }
        let Some(key) = matching.filter(|_| known) else {
            return Err(Refusal::Unauthenticated);
        };

        let lifetime = settings.limits.nonce_lifetime;
        match nonce::verify(&settings.nonce_keys, nonce, request.from.client, unix_seconds, lifetime) {
            Freshness::Fresh => Ok(User { name, key }),
            Freshness::Stale => Err(Refusal::StaleNonce(key)),
        }
    }

    /// The answer to a request that is not authenticated.
    pub(super) fn refuse(&mut self, request: &Request<'_>, refusal: Refusal) -> Verdict {
        let (code, key) = match refusal {
            Refusal::BadRequest => return self.error(request, ErrorCode::BAD_REQUEST, None, |_| {}),
            Refusal::Unauthenticated => (ErrorCode::UNAUTHENTICATED, None),
            Refusal::StaleNonce(key) => (ErrorCode::STALE_NONCE, Some(key)),
        };
        let settings = self.settings.clone();
        let unix_seconds = request.now.wall / 1000;
        let nonce = nonce::Nonce::mint(&settings.nonce_keys, request.from.client, unix_seconds);
        self.error(request, code, key.as_ref(), |writer| {
            writer.attribute(&Realm(settings.realm.as_bytes()));
            if let Some(nonce) = &nonce {
                writer.attribute(&Nonce(nonce.as_bytes()));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::{Credentials, Lab, NOW, SECRET, USER, addr, udp};
    use super::*;
    use crate::wire::Class;
    use crate::wire::attribute::Software;
    use crate::{DropReason, Key};

    #[test]
    fn first_contact_is_401_with_realm_and_nonce() {
        for method in [Method::Allocate, Method::Refresh, Method::CreatePermission, Method::ChannelBind] {
            let mut lab = Lab::new();
            let reply = lab.unsigned(method, |_| {});
            assert_eq!(reply.code(), 401);
            let message = reply.message();
            assert_eq!(message.attribute(), Ok(Some(Realm(b"turnpike"))));
            let Ok(Some(Nonce(nonce))) = message.attribute() else { panic!("no NONCE") };
            assert!(nonce.starts_with(b"obMatJos2AAAA") && nonce.len() < 128);
            assert!(!message.contains(AttributeType::MESSAGE_INTEGRITY));
            assert!(!message.contains(AttributeType::USERNAME));
            assert!(!message.contains(AttributeType::SOFTWARE));
        }
    }

    #[test]
    fn a_stranger_is_not_worth_more_than_three_times_its_packet() {
        // abuse.md D, IPv4 and UDP headers counted: the smallest request there is.
        let mut lab = Lab::new();
        let reply = lab.unsigned(Method::Allocate, |_| {});
        assert!(reply.bytes.len() <= 116, "{}", reply.bytes.len());
        assert!(reply.bytes.len() + 28 <= 3 * (20 + 28));
    }

    /// Changes the request that would authenticate, then says what came of it.
    type Case = (&'static str, fn(&mut Lab, &mut Credentials), u16);

    #[test]
    fn who_is_let_in() {
        let cases: &[Case] = &[
            ("right", |_, _| {}, 0),
            ("wrong password", |_, with| with.password = b"wrong".to_vec(), 401),
            ("unknown user", |_, with| with.username = b"mallory".to_vec(), 401),
            ("no user", |_, with| with.username.clear(), 401),
            (
                "an unknown user with the password that stands in for it",
                |_, with| {
                    with.username = b"mallory".to_vec();
                    with.password = b"nobody's password".to_vec();
                },
                401,
            ),
            ("expired", |lab, with| *with = lab.rest(NOW / 1000), 401),
            ("of another secret", |lab, with| *with = lab.rest_of(b"other", NOW / 1000 + 9), 401),
            ("of the retired secret", |lab, with| *with = lab.rest_of(b"retired", NOW / 1000 + 9), 0),
            ("negative time", |_, with| with.sign_as(SECRET, b"-1700000999:alice"), 401),
            ("overflowing time", |_, with| with.sign_as(SECRET, b"99999999999999999999:alice"), 401),
            ("absent time", |_, with| with.sign_as(SECRET, b":alice"), 401),
            ("another realm", |_, with| with.realm = b"elsewhere".to_vec(), 401),
            ("garbage for a nonce", |_, with| with.nonce = b"garbage".to_vec(), 438),
            ("empty nonce", |_, with| with.nonce.clear(), 438),
            ("a nonce of another port", |lab, with| with.nonce = lab.nonce_for("203.0.113.9:1"), 438),
            ("a nonce of another IP", |lab, with| with.nonce = lab.nonce_for("203.0.113.8:51234"), 438),
            ("nonce an hour old", |lab, _| lab.pass(3600), 0),
            ("nonce too old", |lab, _| lab.pass(3601), 438),
            (
                "nonce too old and wrong password",
                |lab, with| {
                    lab.pass(3601);
                    with.password = b"wrong".to_vec();
                },
                401,
            ),
            (
                "nonce under a retired key",
                |lab, _| lab.configure(|settings| settings.nonce_keys.0.insert(0, Key { id: 9, secret: vec![9; 32] })),
                0,
            ),
            ("nonce under a key that is gone", |lab, _| lab.configure(|settings| settings.nonce_keys.0[0].id = 9), 438),
            ("USERNAME of 508 bytes", |_, with| with.username = vec![b'a'; 508], 401),
            ("USERNAME of 509 bytes", |_, with| with.username = vec![b'a'; 509], 400),
            ("REALM of 764 bytes", |_, with| with.realm = vec![b'a'; 764], 400),
            ("NONCE of 764 bytes", |_, with| with.nonce = vec![b'a'; 764], 400),
        ];
        for (what, change, expected) in cases {
            let mut lab = Lab::new();
            let mut with = lab.credentials();
            change(&mut lab, &mut with);
            let reply = lab.signed(&with, Method::Allocate, udp);
            assert_eq!(reply.code(), *expected, "{what}");
            let message = reply.message();
            let challenged = message.contains(AttributeType::REALM) && message.contains(AttributeType::NONCE);
            assert_eq!(challenged, matches!(expected, 401 | 438), "{what}");
            // RFC 8489 §9.2.4; abuse.md C: every answer after authentication is signed.
            let signed = message.verify_integrity(&with.key());
            assert_eq!(signed, matches!(expected, 0 | 438), "{what}");
            assert_eq!(message.contains(AttributeType::MESSAGE_INTEGRITY), signed, "{what}");
            assert_eq!(lab.server.allocations(), usize::from(*expected == 0), "{what}");
        }
    }

    #[test]
    fn unknown_user_and_wrong_password_look_alike() {
        let mut lab = Lab::new();
        let mut replies = Vec::new();
        for (name, password) in [(USER, &b"wrong"[..]), (b"mallory", b"wrong")] {
            let mut with = lab.credentials();
            with.username = name.to_vec();
            with.password = password.to_vec();
            let packet = lab.packet_of(&[7; 12], Some(&with), Method::Allocate, udp);
            replies.push(lab.exchange(&packet).bytes);
        }
        assert_eq!(replies[0], replies[1]);
    }

    #[test]
    fn integrity_without_the_rest_is_400() {
        // RFC 8489 §9.2.4: without REALM and NONCE in the answer.
        for missing in [AttributeType::USERNAME, AttributeType::REALM, AttributeType::NONCE] {
            let mut lab = Lab::new();
            let with = lab.credentials();
            let reply = lab.unsigned(Method::Allocate, |writer| {
                for (attribute, value) in [
                    (AttributeType::USERNAME, &with.username),
                    (AttributeType::REALM, &with.realm),
                    (AttributeType::NONCE, &with.nonce),
                ] {
                    if attribute != missing {
                        writer.raw(attribute.0, value);
                    }
                }
                writer.integrity(&with.key());
            });
            assert_eq!(reply.code(), 400, "{missing:?}");
            assert!(!reply.message().contains(AttributeType::NONCE));
            assert!(!reply.message().contains(AttributeType::MESSAGE_INTEGRITY));
        }
    }

    #[test]
    fn a_foreign_realm_is_401_also_under_the_right_key() {
        let mut lab = Lab::new();
        let with = lab.credentials();
        let reply = lab.unsigned(Method::Allocate, |writer| {
            udp(writer);
            writer.attribute(&Username(&with.username));
            writer.attribute(&Realm(b"elsewhere"));
            writer.attribute(&Nonce(&with.nonce));
            writer.integrity(&with.key());
        });
        assert_eq!(reply.code(), 401);
        assert_eq!(reply.message().attribute(), Ok(Some(Realm(b"turnpike"))));
    }

    #[test]
    fn algorithms_that_were_not_offered() {
        // RFC 8489 §9.2.4: with the bit in the nonce 400; without it they are unknown, 420.
        let mut lab = Lab::new();
        let mut with = lab.credentials();
        with.nonce = b"obMatJos2gAAAwhatever".to_vec();
        let reply = lab.signed(&with, Method::Allocate, |writer| writer.raw(0x001D, &[0, 2, 0, 0]));
        assert_eq!(reply.code(), 400);
        let with = lab.credentials();
        let reply = lab.signed(&with, Method::Allocate, |writer| writer.raw(0x001D, &[0, 2, 0, 0]));
        assert_eq!(reply.code(), 420);
        // SHA-256 alone is no integrity this server verifies.
        let reply = lab.unsigned(Method::Allocate, |writer| writer.raw(0x001C, &[0; 32]));
        assert_eq!(reply.code(), 401);
    }

    #[test]
    fn unknown_attributes_come_after_authentication_and_before_437() {
        let mut lab = Lab::new();
        let reply = lab.unsigned(Method::Refresh, |writer| writer.raw(0x7FFF, &[]));
        assert_eq!(reply.code(), 401);
        let reply = lab.request(Method::Refresh, |writer| writer.raw(0x7FFF, &[]));
        assert_eq!(reply.code(), 420);
        let reply = lab.request(Method::Refresh, |_| {});
        assert_eq!(reply.code(), 437);
    }

    #[test]
    fn without_keys_there_is_silence_but_for_binding() {
        // Promise P5.
        type Change = fn(&mut crate::Settings);
        let cases: &[(&str, Change)] = &[
            ("no users", |settings| {
                settings.rest_secrets.0.clear();
                settings.static_users.clear();
            }),
            ("no nonce keys", |settings| settings.nonce_keys.0.clear()),
            ("no realm", |settings| settings.realm.clear()),
        ];
        for (what, change) in cases {
            let mut lab = Lab::allocated();
            assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
            let with = lab.credentials();
            lab.configure(change);
            for method in [Method::Allocate, Method::Refresh, Method::CreatePermission, Method::ChannelBind] {
                let packet = lab.packet(Some(&with), method, |_| {});
                assert_eq!(lab.client_packet(&packet).dropped(), Some(DropReason::NotReady), "{what}");
            }
            assert_eq!(lab.unsigned(Method::Binding, |_| {}).code(), 0, "{what}");
            // What was restored or allocated goes on.
            assert_eq!(lab.channel_data(0x4000, b"x").dropped(), None, "{what}");
        }
    }

    #[test]
    fn a_call_outlasts_its_credentials() {
        let mut lab = Lab::new();
        let with = lab.rest(NOW / 1000 + 60);
        assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 0);
        lab.pass(61);
        assert_eq!(lab.signed(&with, Method::Refresh, |_| {}).code(), 0);
        // Another five-tuple gets nothing for them.
        lab.client(addr("203.0.113.9:7"));
        let mut elsewhere = with.clone();
        elsewhere.nonce = lab.nonce_for("203.0.113.9:7");
        let reply = lab.signed(&elsewhere, Method::Allocate, udp);
        assert_eq!(reply.code(), 401);
        // A secret that left the ring ends them.
        lab.client(addr("203.0.113.9:51234"));
        lab.configure(|settings| settings.rest_secrets.0.clear());
        assert_eq!(lab.signed(&with, Method::Refresh, |_| {}).code(), 401);
    }

    #[test]
    fn fingerprint_is_answered_with_fingerprint() {
        let mut lab = Lab::new();
        let reply = lab.unsigned(Method::Allocate, |writer| {
            writer.attribute(&Software(b"client")).fingerprint();
        });
        assert!(reply.message().contains(AttributeType::FINGERPRINT));
        assert_eq!(reply.message().class(), Class::Error);
        let reply = lab.unsigned(Method::Allocate, |_| {});
        assert!(!reply.message().contains(AttributeType::FINGERPRINT));
    }
}
