//! Who is let in, by which credentials, and what the others are told.

use super::super::lab::{Credentials, Lab, NOW, SECRET, USER, addr, udp};
use super::*;
use crate::wire::attribute::Software;
use crate::wire::{Class, MessageWriter, Method};
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
        assert!(nonce.starts_with(b"obMatJos2gAAA") && nonce.len() < 128);
        // RFC 8489 §9.2.4, §14.11: SHA-256, then MD5.
        assert_eq!(message.attribute(), Ok(Some(attribute::PasswordAlgorithms(&[0, 2, 0, 0, 0, 1, 0, 0]))));
        assert!(!message.contains(AttributeType::MESSAGE_INTEGRITY));
        assert!(!message.contains(AttributeType::USERNAME));
        assert!(!message.contains(AttributeType::SOFTWARE));
    }
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
fn a_member_that_may_lag_answers_no_allocate_with_438_for_a_key_it_does_not_know() {
    let lags = |lab: &mut Lab| {
        lab.configure(|settings| {
            settings.nonce_keys.0.iter_mut().for_each(|key| key.id = 9);
            settings.nonce_keys_may_lag = true;
        });
    };
    let mut lab = Lab::new();
    let with = lab.credentials();
    let packet = lab.packet(Some(&with), Method::Allocate, udp);
    lags(&mut lab);
    assert_eq!(lab.client_packet(&packet).dropped(), Some(DropReason::NotReady));
    // It has heard of the key: the retransmission is served.
    lab.configure(|settings| settings.nonce_keys.0.iter_mut().for_each(|key| key.id = 1));
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 0);
    // Whoever holds an allocation retries once (clients.md), and what is too old under any key is stale.
    lags(&mut lab);
    assert_eq!(lab.signed(&with, Method::Refresh, |_| {}).code(), 438);
    let mut lab = Lab::new();
    let with = lab.credentials();
    lags(&mut lab);
    lab.pass(3601);
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 438);
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

/// RFC 8489 §9.2.4: PASSWORD-ALGORITHM(S), checked before the user is looked up.
#[test]
fn what_was_offered_must_come_back() {
    const OFFERED: &[u8] = &PasswordAlgorithm::OFFERED;
    type Case = (&'static str, &'static [u8], Option<&'static [u8]>, Option<&'static [u8]>, u16);
    let cases: &[Case] = &[
        // nonce cookie, PASSWORD-ALGORITHMS, PASSWORD-ALGORITHM
        ("both", b"gAAA", Some(OFFERED), Some(&[0, 2, 0, 0]), 0),
        ("the weaker one", b"gAAA", Some(OFFERED), Some(&[0, 1, 0, 0]), 0),
        ("neither is MD5", b"gAAA", None, None, 0),
        ("no PASSWORD-ALGORITHMS", b"gAAA", None, Some(&[0, 2, 0, 0]), 400),
        ("no PASSWORD-ALGORITHM", b"gAAA", Some(OFFERED), None, 400),
        ("SHA-256 taken out of the offer", b"gAAA", Some(&[0, 1, 0, 0]), Some(&[0, 1, 0, 0]), 400),
        ("MD5 taken out", b"gAAA", Some(&[0, 2, 0, 0]), Some(&[0, 2, 0, 0]), 400),
        ("in another order", b"gAAA", Some(&[0, 1, 0, 0, 0, 2, 0, 0]), Some(&[0, 2, 0, 0]), 400),
        ("an algorithm more", b"gAAA", Some(&[0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0]), Some(&[0, 2, 0, 0]), 400),
        ("none offered", b"gAAA", Some(&[]), Some(&[0, 2, 0, 0]), 400),
        ("one that was not offered", b"gAAA", Some(OFFERED), Some(&[0, 3, 0, 0]), 400),
        ("the reserved one", b"gAAA", Some(OFFERED), Some(&[0, 0, 0, 0]), 400),
        ("with parameters", b"gAAA", Some(OFFERED), Some(&[0, 2, 0, 4, 0, 0, 0, 0]), 400),
        ("cut", b"gAAA", Some(OFFERED), Some(&[0, 2]), 400),
        ("empty", b"gAAA", Some(OFFERED), Some(&[]), 400),
        // A nonce without the bit is from another time, or its bit was taken away: it is stale.
        ("bit taken away", b"AAAA", Some(OFFERED), Some(&[0, 2, 0, 0]), 438),
        ("bit taken away and the offer too", b"AAAA", None, None, 438),
        ("bit taken away, unknown algorithm", b"AAAA", None, Some(&[0, 3, 0, 0]), 400),
    ];
    for (what, cookie, offered, chosen, expected) in cases {
        let mut lab = Lab::new();
        let mut with = lab.credentials();
        with.nonce[9..13].copy_from_slice(cookie);
        let sha256 = *chosen == Some(&[0, 2, 0, 0]);
        let algorithm = if sha256 { PasswordAlgorithm::Sha256 } else { PasswordAlgorithm::Md5 };
        for integrity in [Integrity::Sha1, Integrity::Sha256] {
            let key = IntegrityKey::long_term(algorithm, &with.username, &with.realm, &with.password).with(integrity);
            lab.client(addr("203.0.113.9:51234"));
            let reply = lab.unsigned(Method::Refresh, |writer| {
                writer
                    .attribute(&Username(&with.username))
                    .attribute(&Realm(&with.realm))
                    .attribute(&Nonce(&with.nonce));
                if let Some(offered) = offered {
                    writer.attribute(&attribute::PasswordAlgorithms(offered));
                }
                if let Some(chosen) = chosen {
                    writer.attribute(&attribute::PasswordAlgorithm(chosen));
                }
                key.sign(writer);
            });
            // There is no allocation to refresh.
            let expected = if *expected == 0 { 437 } else { *expected };
            assert_eq!(reply.code(), expected, "{what}, {integrity:?}");
            let message = reply.message();
            // RFC 8489 §9.2.4: MESSAGE-INTEGRITY-SHA256 unless the request spoke of no algorithm.
            let answer = if chosen.is_some() || offered.is_some() { Integrity::Sha256 } else { Integrity::Sha1 };
            assert_eq!(key.with(answer).verifies(&message), expected != 400, "{what}, {integrity:?}");
            let signed = [AttributeType::MESSAGE_INTEGRITY, AttributeType::MESSAGE_INTEGRITY_SHA256];
            let count = signed.iter().filter(|attribute| message.contains(**attribute)).count();
            assert_eq!(count, usize::from(expected != 400), "{what}, {integrity:?}");
            let challenged = matches!(message.attribute(), Ok(Some(attribute::PasswordAlgorithms(OFFERED))));
            assert_eq!(challenged, expected == 438, "{what}, {integrity:?}");
        }
    }
}

#[test]
fn algorithms_are_looked_at_before_the_user() {
    let mut lab = Lab::new();
    let mut with = lab.credentials().sha256();
    with.username = b"mallory".to_vec();
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 401);
    let reply = lab.unsigned(Method::Allocate, |writer| {
        writer.attribute(&Username(b"mallory")).attribute(&Realm(&with.realm)).attribute(&Nonce(&with.nonce));
        writer.attribute(&attribute::PasswordAlgorithm(&[0, 2, 0, 0])).integrity(b"whatever");
    });
    assert_eq!(reply.code(), 400);
}

#[test]
fn sha256_lets_in_whom_it_should() {
    let cases: &[Case] = &[
        ("static user", |_, _| {}, 0),
        ("TURN REST", |lab, with| *with = lab.rest(NOW / 1000 + 9).sha256(), 0),
        ("TURN REST of the retired secret", |lab, with| *with = lab.rest_of(b"retired", NOW / 1000 + 9).sha256(), 0),
        ("TURN REST by SHA-256", |lab, with| *with = lab.rest_sha256(NOW / 1000 + 9).sha256(), 0),
        ("TURN REST by SHA-256, expired", |lab, with| *with = lab.rest_sha256(NOW / 1000).sha256(), 401),
        ("TURN REST by SHA-256, long-term key by MD5", |lab, with| *with = lab.rest_sha256(NOW / 1000 + 9), 0),
        ("wrong password", |_, with| with.password = b"wrong".to_vec(), 401),
        ("MESSAGE-INTEGRITY with a SHA-256 key", |_, with| with.integrity = Integrity::Sha1, 0),
        ("MESSAGE-INTEGRITY-SHA256 with an MD5 key", |_, with| with.algorithm = None, 0),
        ("MESSAGE-INTEGRITY-SHA256, MD5 by name", |_, with| with.algorithm = Some(PasswordAlgorithm::Md5), 0),
        ("static user by hash", |_, with| with.anonymous = true, 0),
        (
            "static user by hash, wrong password",
            |_, with| {
                with.anonymous = true;
                with.password = b"wrong".to_vec();
            },
            401,
        ),
        (
            "nobody by hash",
            |_, with| {
                with.anonymous = true;
                with.username = b"mallory".to_vec();
            },
            401,
        ),
        (
            "TURN REST by hash",
            |lab, with| {
                *with = lab.rest(NOW / 1000 + 9).sha256();
                with.anonymous = true;
            },
            401,
        ),
        (
            "hash of another realm",
            |_, with| {
                with.anonymous = true;
                with.realm = b"elsewhere".to_vec();
            },
            401,
        ),
        ("nonce too old", |lab, _| lab.pass(3601), 438),
    ];
    for (what, change, expected) in cases {
        let mut lab = Lab::new();
        let mut with = lab.credentials().sha256();
        change(&mut lab, &mut with);
        let reply = lab.signed(&with, Method::Allocate, udp);
        assert_eq!(reply.code(), *expected, "{what}");
        let message = reply.message();
        let answer = if with.algorithm.is_some() { Integrity::Sha256 } else { Integrity::Sha1 };
        let signed = with.integrity_key().with(answer).verifies(&message);
        assert_eq!(signed, matches!(expected, 0 | 438), "{what}");
        let challenged = [AttributeType::REALM, AttributeType::NONCE, AttributeType::PASSWORD_ALGORITHMS]
            .iter()
            .all(|attribute| message.contains(*attribute));
        assert_eq!(challenged, matches!(expected, 401 | 438), "{what}");
        // RFC 8489 §9.2.4: neither name goes out.
        assert!(!message.contains(AttributeType::USERNAME) && !message.contains(AttributeType::USERHASH), "{what}");
        assert_eq!(lab.server.allocations(), usize::from(*expected == 0), "{what}");
    }
}

#[test]
fn the_name_behind_a_hash_owns_the_allocation() {
    let mut lab = Lab::new();
    let mut with = lab.credentials().sha256();
    with.anonymous = true;
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 0);
    let changes = lab.changes();
    let [crate::Change::Put(record)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(record.username, USER);
    // By name or by hash, it is the same user.
    assert_eq!(lab.refresh(600), 0);
    assert_eq!(lab.signed(&with, Method::Refresh, |_| {}).code(), 0);
}

#[test]
fn whoever_holds_an_allocation_can_be_found_by_its_hash() {
    let mut lab = Lab::new();
    let mut with = lab.rest(NOW / 1000 + 60).sha256();
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 0);
    with.anonymous = true;
    assert_eq!(lab.signed(&with, Method::Refresh, |_| {}).code(), 0);
    lab.pass(61);
    assert_eq!(lab.signed(&with, Method::Refresh, |_| {}).code(), 0);
}

#[test]
fn a_name_and_a_hash_together() {
    // RFC 8489 §9.2.3.2 knows either; the name counts.
    let mut lab = Lab::new();
    let with = lab.credentials().sha256();
    let mut request = |hash: &[u8]| {
        let reply = lab.signed(&with, Method::Refresh, |writer| writer.raw(0x001E, hash));
        reply.code()
    };
    assert_eq!(request(&[7; 32]), 437);
    assert_eq!(request(&[7; 31]), 400);
}

#[test]
fn integrity_has_its_lengths_and_its_order() {
    // RFC 8489 §14.6: TURN allows no truncation. §14.5: what follows either attribute means nothing.
    let mut lab = Lab::new();
    let with = lab.credentials().sha256();
    let key = with.integrity_key();
    let request = |lab: &Lab, sign: &dyn Fn(&mut MessageWriter<'_>)| {
        lab.packet(None, Method::Refresh, |writer| {
            writer.attribute(&Username(&with.username)).attribute(&Realm(&with.realm)).attribute(&Nonce(&with.nonce));
            writer.attribute(&attribute::PasswordAlgorithm(&PasswordAlgorithm::Sha256.to_value()));
            writer.attribute(&attribute::PasswordAlgorithms(&PasswordAlgorithm::OFFERED));
            sign(writer);
        })
    };
    for len in [0, 12, 16, 18, 20, 28, 32, 36] {
        // A value of that length, right as far as it goes.
        let mut packet = request(&lab, &|writer| writer.raw(0x001C, &vec![0; len]));
        let value = packet.len() - len.next_multiple_of(4);
        let mac = crate::wire::integrity::message_integrity_sha256(
            crate::wire::integrity::keyed(key.as_bytes()),
            &packet[..value - 4],
            4 + len,
        );
        packet[value..value + len.min(32)].copy_from_slice(&mac[..len.min(32)]);
        let expected = if len == 32 { 437 } else { 401 };
        assert_eq!(lab.exchange(&packet).code(), expected, "{len} bytes");
    }
    type Sign<'a> = &'a dyn Fn(&mut MessageWriter<'_>);
    let cases: &[(&str, Sign<'_>, u16)] = &[
        (
            "both, right",
            &|w| {
                w.integrity(key.as_bytes()).integrity_sha256(key.as_bytes());
            },
            437,
        ),
        (
            "SHA-256 counts",
            &|w| {
                w.integrity(b"wrong").integrity_sha256(key.as_bytes());
            },
            437,
        ),
        (
            "SHA-256 counts, and is wrong",
            &|w| {
                w.integrity(key.as_bytes()).integrity_sha256(b"wrong");
            },
            401,
        ),
        (
            "after SHA-256 nothing counts",
            &|w| {
                w.integrity_sha256(key.as_bytes()).integrity(b"wrong");
            },
            437,
        ),
        (
            "an unsigned unknown attribute",
            &|w| {
                w.integrity_sha256(key.as_bytes());
                w.raw(0x7FFF, &[]);
            },
            437,
        ),
        (
            "a second one",
            &|w| {
                w.integrity_sha256(key.as_bytes()).integrity_sha256(b"wrong");
            },
            437,
        ),
        (
            "a second one, and the first is wrong",
            &|w| {
                w.integrity_sha256(b"wrong").integrity_sha256(key.as_bytes());
            },
            401,
        ),
    ];
    for (what, sign, expected) in cases {
        let packet = request(&lab, sign);
        assert_eq!(lab.exchange(&packet).code(), *expected, "{what}");
    }
}

#[test]
fn sha256_switched_off_is_unknown() {
    // RFC 8489 §9.2.4 of a server that offers nothing.
    let mut lab = Lab::new();
    lab.configure(|settings| settings.features.sha256 = false);
    let reply = lab.unsigned(Method::Allocate, |_| {});
    let Ok(Some(Nonce(nonce))) = reply.message().attribute() else { panic!("no NONCE") };
    assert!(nonce.starts_with(b"obMatJos2AAAA"));
    assert!(!reply.message().contains(AttributeType::PASSWORD_ALGORITHMS));
    // It names an algorithm all the same: unknown.
    let mut with = lab.credentials();
    with.algorithm = Some(PasswordAlgorithm::Md5);
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 420);
    // With a bit in the nonce that this server did not set: 400.
    with.nonce = b"obMatJos2gAAAwhatever".to_vec();
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 400);
    // Integrity by SHA-256 alone is none, and a hash is no name.
    let mut with = lab.credentials();
    with.integrity = Integrity::Sha256;
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 401);
    let mut with = lab.credentials();
    with.anonymous = true;
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 400);
    let with = lab.rest_sha256(NOW / 1000 + 9);
    assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 401);
    assert_eq!(lab.allocate(), 0);
}

/// An Allocate from another port by these credentials.
fn from_port(lab: &mut Lab, port: u16, with: &Credentials) -> u16 {
    lab.from.client.set_port(port);
    let with = Credentials { nonce: lab.nonce_for(&lab.from.client.to_string()), ..with.clone() };
    lab.signed(&with, Method::Allocate, udp).code()
}

#[test]
fn a_known_name_is_let_in_no_longer_than_an_unknown_one() {
    // Expired, of a secret that left the ring, of another realm, of a hash that is switched off.
    let mut lab = Lab::new();
    let with = lab.rest(NOW / 1000 + 60);
    for port in [1, 2] {
        assert_eq!(from_port(&mut lab, port, &with), 0);
    }
    let wrong = Credentials { password: b"wrong".to_vec(), ..with.clone() };
    assert_eq!(from_port(&mut lab, 3, &wrong), 401);
    assert_eq!(from_port(&mut lab, 3, &with.clone().sha256()), 0, "by the other attribute");
    lab.pass(60);
    assert_eq!(from_port(&mut lab, 4, &with), 401, "expired");
    lab.from.client.set_port(1);
    let holder = Credentials { nonce: lab.nonce_for(&lab.from.client.to_string()), ..with.clone() };
    assert_eq!(lab.signed(&holder, Method::Refresh, |_| {}).code(), 0, "a call lasts longer");

    let mut lab = Lab::new();
    let retired = lab.rest_of(b"retired", NOW / 1000 + 60);
    assert_eq!(from_port(&mut lab, 1, &retired), 0);
    lab.configure(|settings| drop(settings.rest_secrets.0.pop()));
    assert_eq!(from_port(&mut lab, 2, &retired), 401, "its secret is gone");

    let mut lab = Lab::new();
    let sha256 = lab.rest_sha256(NOW / 1000 + 60);
    assert_eq!(from_port(&mut lab, 1, &sha256), 0);
    lab.configure(|settings| settings.features.sha256 = false);
    assert_eq!(from_port(&mut lab, 2, &sha256), 401, "the hash is switched off");
}

#[test]
fn only_who_has_authenticated_becomes_known() {
    let mut lab = Lab::new();
    let with = lab.rest(NOW / 1000 + 60);
    for number in 0..100 {
        let username = format!("{}:{number}", NOW / 1000 + 60).into_bytes();
        assert_eq!(from_port(&mut lab, 1, &Credentials { username, ..with.clone() }), 401);
    }
    let stale = Credentials { nonce: b"garbage".to_vec(), ..with.clone() };
    assert_eq!(lab.signed(&stale, Method::Allocate, udp).code(), 438);
    assert_eq!(lab.server.known.len(), 0);
    assert_eq!(from_port(&mut lab, 1, &with), 0);
    assert_eq!(lab.server.known.len(), 1);
}
