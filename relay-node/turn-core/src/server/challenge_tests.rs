//! How long an answer to a stranger is (abuse.md D), and what it says.

use super::super::lab::{Lab, addr, udp};
use super::*;
use crate::wire::attribute::Username;
use crate::wire::{AttributeType, Message, MessageWriter, Method};
use crate::{KeyRing, ThirdParty};

const CLIENTS: [(&str, usize); 3] =
    [("203.0.113.9:51234", 28), ("[::ffff:203.0.113.9]:51234", 28), ("[2001:db8::9]:51234", 48)];

/// What it is, and how to write it.
type Form = (&'static str, Method, fn(&mut MessageWriter<'_>));

/// What a stranger may send.
const FORMS: &[Form] = &[
    ("bare Allocate", Method::Allocate, |_| {}),
    ("bare Refresh", Method::Refresh, |_| {}),
    ("bare CreatePermission", Method::CreatePermission, |_| {}),
    ("bare ChannelBind", Method::ChannelBind, |_| {}),
    ("Allocate in earnest", Method::Allocate, udp),
    ("fingerprinted", Method::Allocate, |w| {
        w.fingerprint();
    }),
    ("Binding", Method::Binding, |_| {}),
    ("Binding with an unknown attribute", Method::Binding, |w| w.raw(0x7FFF, &[])),
    ("Binding with many unknown attributes", Method::Binding, |w| {
        (0x7000..0x7020).for_each(|attribute| w.raw(attribute, &[]));
    }),
    ("MESSAGE-INTEGRITY alone", Method::Allocate, |w| w.raw(0x0008, &[0; 20])),
    ("empty MESSAGE-INTEGRITY", Method::Allocate, |w| w.raw(0x0008, &[])),
    ("empty MESSAGE-INTEGRITY-SHA256", Method::Allocate, |w| w.raw(0x001C, &[])),
    ("empty everything", Method::Allocate, |w| {
        [0x0006, 0x0014, 0x0015, 0x0008].into_iter().for_each(|attribute| w.raw(attribute, &[]));
    }),
    ("forged", Method::Refresh, |w| {
        w.attribute(&Username(b"a")).attribute(&Realm(b"r")).attribute(&Nonce(b"n")).integrity(b"key");
    }),
];

#[test]
fn no_answer_to_a_stranger_is_worth_more_than_three_times_its_packet() {
    // abuse.md D, IP and UDP headers counted; realms up to the documented bound and beyond.
    type Change = fn(&mut crate::Settings);
    let settings: &[(&str, Change)] = &[
        ("as it comes", |_| {}),
        ("no SHA-256", |settings| settings.features.sha256 = false),
        ("static users only", |settings| settings.rest_secrets.0.clear()),
        ("third party", |settings| settings.third_party = Some(third_party(20))),
        ("third party with a long name", |settings| settings.third_party = Some(third_party(255))),
    ];
    for (client, headers) in CLIENTS {
        for (setting, change) in settings {
            for realm in [1, 8, 20, 24, 36, 37, 60, 127, 508] {
                let mut lab = Lab::new();
                lab.client(addr(client));
                lab.configure(|settings| {
                    change(settings);
                    settings.realm = "r".repeat(realm);
                });
                for (form, method, write) in FORMS {
                    let packet = lab.packet(None, *method, write);
                    let outcome = lab.client_packet(&packet);
                    let what = format!("{form} from {client}, {setting}, realm of {realm} bytes");
                    match outcome.dropped() {
                        Some(DropReason::Amplification) => {
                            let in_earnest = *form == "Allocate in earnest";
                            assert!(realm > if in_earnest { 60 } else { 36 }, "{what}: silence");
                        }
                        Some(reason) => panic!("{what}: {reason:?}"),
                        None => {
                            let answer = lab.server.reply();
                            assert!(answer.len() + headers <= 3 * (packet.len() + headers), "{what}: {}", answer.len());
                            Message::parse(answer).expect("our own message");
                        }
                    }
                }
            }
        }
    }
}

fn third_party(name: usize) -> ThirdParty {
    ThirdParty { server_name: "n".repeat(name), keys: Vec::new() }
}

#[test]
fn what_is_left_out_goes_in_order() {
    // A bare Allocate over IPv4 may be answered with 116 bytes.
    // Lengths of realm and server name; then of reason phrase and nonce, and whether the server name is there.
    type Case = (&'static str, usize, Option<usize>, usize, usize, bool);
    let cases: &[Case] = &[
        ("everything fits", 8, None, 15, 41, false),
        ("no reason", 9, None, 0, 41, false),
        ("no reason, the longest realm", 24, None, 0, 41, false),
        ("a short nonce", 25, None, 0, 31, false),
        ("a short nonce, the longest realm", 36, None, 0, 31, false),
        ("a server name", 8, Some(12), 0, 41, true),
        ("a longer server name", 8, Some(24), 0, 31, true),
        ("a server name that is too long", 8, Some(25), 0, 31, false),
    ];
    for (what, realm, name, reason, nonce, named) in cases {
        let mut lab = Lab::new();
        lab.configure(|settings| {
            settings.realm = "r".repeat(*realm);
            settings.third_party = name.map(third_party);
        });
        let reply = lab.unsigned(Method::Allocate, |_| {});
        let message = reply.message();
        let length = |attribute| message.range(attribute).map_or(0, |range| range.len());
        assert_eq!(length(AttributeType::ERROR_CODE), 4 + reason, "{what}");
        assert_eq!(length(AttributeType::NONCE), *nonce, "{what}");
        assert_eq!(length(AttributeType::REALM), *realm, "{what}");
        assert_eq!(length(AttributeType::PASSWORD_ALGORITHMS), 8, "{what}");
        assert_eq!(message.contains(AttributeType::THIRD_PARTY_AUTHORIZATION), *named, "{what}");
        // Any nonce will do.
        let mut with = lab.credentials();
        with.nonce = reply.bytes[message.range(AttributeType::NONCE).expect("there")].to_vec();
        assert_eq!(lab.signed(&with, Method::Allocate, udp).code(), 0, "{what}");
    }
}

#[test]
fn a_stream_is_told_everything() {
    let mut lab = Lab::new();
    lab.from.transport = Transport::Tcp;
    lab.path = crate::Path::Connection(crate::ConnectionId(1));
    lab.configure(|settings| settings.realm = "r".repeat(127));
    let reply = lab.unsigned(Method::Allocate, |_| {});
    assert_eq!(reply.message().attribute(), Ok(Some(ErrorCode::UNAUTHENTICATED)));
    assert!(reply.bytes.len() > 200);
}

#[test]
fn anonymity_is_offered_where_every_user_can_be_found() {
    // RFC 8489 §9.2.5: a client that sees the bit must send USERHASH.
    let nonce_of = |change: fn(&mut crate::Settings)| {
        let mut lab = Lab::new();
        lab.configure(change);
        let reply = lab.unsigned(Method::Allocate, |_| {});
        let Ok(Some(Nonce(nonce))) = reply.message().attribute() else { panic!("no NONCE") };
        nonce[9..13].to_vec()
    };
    assert_eq!(nonce_of(|_| {}), b"gAAA");
    assert_eq!(nonce_of(|settings| settings.rest_secrets = KeyRing::default()), b"wAAA");
    assert_eq!(nonce_of(|settings| settings.features.sha256 = false), b"AAAA");
    let nonce = nonce_of(|settings| {
        settings.rest_secrets = KeyRing::default();
        settings.third_party = Some(third_party(5));
    });
    assert_eq!(nonce, b"gAAA");
}

/// A lab in which a prefix gets 200 answers a second.
fn limited() -> Lab {
    let mut lab = Lab::new();
    lab.configure(|settings| settings.limits.strangers_per_prefix = 200);
    lab
}

#[test]
fn a_prefix_that_asks_too_much_gets_silence_and_others_do_not() {
    for (form, method, write) in FORMS {
        let mut lab = limited();
        let mut answers = 0;
        for port in 0..1000 {
            lab.client(addr(&format!("203.0.113.{}:{}", port % 256, 1024 + port)));
            let packet = lab.packet(None, *method, write);
            match lab.client_packet(&packet).dropped() {
                None => answers += 1,
                reason => assert_eq!(reason, Some(DropReason::TooManyStrangers), "{form}"),
            }
        }
        assert_eq!(answers, 200, "{form}");
        // A newcomer elsewhere gets in.
        lab.client(addr("203.0.114.9:51234"));
        assert_eq!(lab.unsigned(Method::Allocate, udp).code(), 401, "{form}");
        assert_eq!(lab.allocate(), 0, "{form}");
        // And one of this prefix a moment later, also one who knows a nonce at once.
        lab.client(addr("203.0.113.9:51234"));
        assert_eq!(lab.allocate(), 0, "{form}");
        lab.now.mono += std::time::Duration::from_millis(10);
        lab.client(addr("203.0.113.9:51235"));
        assert_eq!(lab.unsigned(Method::Allocate, udp).code(), 401, "{form}");
    }
}

#[test]
fn the_holder_of_an_allocation_is_no_stranger() {
    let mut lab = limited();
    assert_eq!(lab.allocate(), 0);
    let old = lab.credentials();
    let holder = lab.from.client;
    let flood = |lab: &mut Lab| {
        for port in 1..1000 {
            lab.client(addr(&format!("203.0.113.9:{port}")));
            let packet = lab.packet(None, Method::Allocate, |_| {});
            lab.client_packet(&packet);
        }
        lab.client(holder);
    };
    flood(&mut lab);
    assert_eq!(lab.refresh(600), 0);
    lab.permit("192.0.2.1");
    assert_eq!(lab.bind(0x4000, "192.0.2.1:9"), 0);
    assert_eq!(lab.unsigned(Method::Binding, |_| {}).code(), 0);
    // 438 too, which it needs to go on.
    lab.configure(|settings| settings.limits.nonce_lifetime = 300);
    lab.pass(301);
    flood(&mut lab);
    assert_eq!(lab.signed(&old, Method::Refresh, |_| {}).code(), 438);
    assert_eq!(lab.refresh(600), 0);
    // But not for what does not prove to come from it.
    let packet = lab.packet(None, Method::Refresh, |_| {});
    assert_eq!(lab.client_packet(&packet).dropped(), Some(DropReason::TooManyStrangers));
}
