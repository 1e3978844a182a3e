//! Each step, and histories of steps on which clients, relays and controllers rely.

use proptest::prelude::*;

use super::*;
use crate::keys::KeyOptions;

const HOUR: u64 = 3_600_000;
const GIVEN: &[u8] = b"a secret of sixteen";

fn fresh() -> Document {
    Document::merge(None, &KeyOptions { realm: "turnpike".to_owned(), ..KeyOptions::default() }).expect("random")
}

/// Relays that have said to have these revisions; nothing stored needs any key, and nobody lives longer than a day.
fn seen(relays: &[u64]) -> Seen {
    Seen {
        relays: relays.to_vec(),
        relays_are_known: true,
        longest_credential: Some((0..=u8::MAX).map(|id| (id, Duration::from_secs(86_400))).collect()),
        records: Some(Records::default()),
    }
}

/// (id, state) of a ring, newest first.
fn states(document: &Document, ring: Ring) -> Vec<(u8, KeyState)> {
    let keys = document.keys(&BTreeMap::new());
    keys.into_iter().filter(|key| key.ring == ring).map(|key| (key.id, key.state)).collect()
}

fn began(document: &Document, ring: Ring, now: u64) -> Document {
    document.begin(ring, None, now).expect("no refusal").expect("begun")
}

fn rotated(document: &Document, ring: Ring, now: u64) -> Document {
    let begun = began(document, ring, now);
    begun.advance(&seen(&[begun.revision]), now).expect("promoted")
}

/// By these relays tell a store that was lost from keys that were retired.
#[test]
fn settings_name_the_revisions_they_came_from() {
    let first = fresh();
    assert_eq!(first.message().lineage, [0], "of a store made anew");
    let (mut before, mut document) = (first.clone(), first.clone());
    for step in 1..=40 {
        let next = document.clone().revised(&document, step);
        before = std::mem::replace(&mut document, next);
    }
    let lineage = document.message().lineage;
    assert!(lineage.is_sorted() && lineage.contains(&before.revision) && !lineage.contains(&document.revision));
    assert!(lineage.len() == 32 && lineage[0] > first.revision, "{lineage:?}");
}

#[test]
fn a_key_is_made_known_before_it_is_used() {
    let document = fresh();
    let now = document.revision;
    for ring in Ring::ALL {
        let begun = began(&document, ring, now);
        assert_eq!(states(&begun, ring), [(0, KeyState::Newest), (1, KeyState::Next)]);
        let told = begun.message();
        let rings = [&told.rest_secrets, &told.nonce_keys, &told.record_keys];
        let sent = rings.into_iter().find(|keys| keys.len() == 2).expect("told of both");
        assert_eq!((sent[0].id, sent[1].id), (0, 1), "relays mint with the first");

        // One relay is behind, or nobody knows who there is: patience, then on without.
        let unknown = Seen { relays_are_known: false, ..seen(&[begun.revision]) };
        for waits in [&seen(&[begun.revision, document.revision]), &unknown] {
            assert_eq!(begun.advance(waits, now + 2_999), None);
            let promoted = begun.advance(waits, now + 3_000).expect("patience ends");
            assert_eq!(states(&promoted, ring), [(1, KeyState::Newest), (0, KeyState::Retiring)]);
        }
        let promoted = begun.advance(&seen(&[begun.revision, begun.revision + 9]), now).expect("all know it");
        assert!(promoted.revision > begun.revision);
        assert_eq!(states(&promoted, ring), [(1, KeyState::Newest), (0, KeyState::Retiring)]);
        assert_eq!(promoted.advance(&seen(&[promoted.revision]), now), None);
    }
}

#[test]
fn two_at_once_rotate_once() {
    let document = fresh();
    let now = document.revision;
    let begun = began(&document, Ring::Nonce, now);
    assert!(matches!(begun.begin(Ring::Nonce, None, now), Ok(None)));
    let given = document.begin(Ring::Rest, Some(GIVEN), now).expect("good").expect("begun");
    assert!(matches!(given.begin(Ring::Rest, Some(GIVEN), now), Ok(None)), "the same command again");
    assert!(matches!(given.begin(Ring::Rest, None, now), Ok(None)));
    let other = given.begin(Ring::Rest, Some(b"another secret of more"), now);
    assert!(matches!(other, Err(RotateError::UnderWay(1))), "{other:?}");
}

#[test]
fn what_is_refused() {
    let document = fresh();
    let now = document.revision;
    let configured = KeyOptions { rest_secrets: vec![b"configured".to_vec()], ..KeyOptions::default() };
    let configured = Document::merge(Some(&document), &configured).expect("merged");
    type Case<'a> = (&'a str, Result<Option<Document>, RotateError>, &'a str);
    let retire = |document: &Document, ring, id| document.retire(ring, id, now).map(Some);
    let mut full = document.clone();
    while full.ring(Ring::Nonce).len() < MOST {
        full = rotated(&full, Ring::Nonce, now);
    }
    let given = document.begin(Ring::Rest, Some(GIVEN), now).expect("good").expect("begun");
    let given = given.advance(&seen(&[]), now).expect("promoted");
    let over = rotated(&given, Ring::Rest, now);
    let cases: [Case<'_>; 9] = [
        ("configured", configured.begin(Ring::Rest, None, now), "rest_secrets"),
        ("retire configured", retire(&configured, Ring::Rest, 1), "rest_secrets"),
        ("a nonce key given", document.begin(Ring::Nonce, Some(GIVEN), now), "made by the controllers"),
        ("a short secret", document.begin(Ring::Rest, Some(b"short"), now), "16 to 1024 bytes"),
        ("a secret of before", over.begin(Ring::Rest, Some(GIVEN), now), "in use before"),
        ("too many", full.begin(Ring::Nonce, None, now), "16 keys"),
        ("the newest", retire(&document, Ring::Record, 0), "rotate the ring first"),
        ("the newest of two", retire(&over, Ring::Rest, 2), "rotate the ring first"),
        ("none", retire(&document, Ring::Record, 7), "no key 7"),
    ];
    for (what, answer, words) in cases {
        let refused = answer.expect_err(what).to_string();
        assert!(refused.contains(words), "{what}: {refused}");
    }
    assert_eq!(states(&over, Ring::Rest)[1], (1, KeyState::Accepted), "apps go on making credentials with it");
    assert_eq!(states(&over.retire(Ring::Rest, 1, now).expect("retired"), Ring::Rest).len(), 2);
}

#[test]
fn keys_leave_when_nothing_needs_them() {
    let document = fresh();
    let now = document.revision;
    let nonce = rotated(&document, Ring::Nonce, now);
    assert_eq!(nonce.advance(&seen(&[]), now + HOUR), None);
    let left = nonce.advance(&seen(&[]), now + HOUR + 300_000).expect("left");
    assert_eq!(states(&left, Ring::Nonce), [(1, KeyState::Newest)]);

    let rest = rotated(&document, Ring::Rest, now);
    let expired = now + 24 * HOUR + 300_000;
    assert_eq!(rest.advance(&seen(&[]), expired - 1), None);
    let not_looked = Seen { records: None, ..seen(&[]) };
    assert_eq!(rest.advance(&not_looked, expired), None);
    // A call goes on whose credentials may have been made with it; one whose were not is no reason to stay.
    let held =
        |at| Seen { records: Some(Records { earliest_credential: Some(at), ..Records::default() }), ..seen(&[]) };
    assert_eq!(rest.advance(&held(now + HOUR), expired + HOUR), None);
    assert!(rest.waits_for_records(seen(&[]).longest_credential.as_ref(), expired));
    assert!(rest.advance(&held(expired + 1), expired + HOUR).is_some());
    assert_eq!(states(&rest.advance(&seen(&[]), expired).expect("left"), Ring::Rest), [(1, KeyState::Newest)]);

    let record = rotated(&document, Ring::Record, now);
    let told = seen(&[record.revision]);
    let sealed = |id| Records { seals: [id].into(), ..Records::default() };
    let later = now + 10_000;
    assert_eq!(record.advance(&told, later - 1), None);
    assert_eq!(record.advance(&Seen { records: None, ..told.clone() }, later), None);
    assert_eq!(record.advance(&Seen { records: Some(sealed(0)), ..told.clone() }, later + HOUR), None);
    assert_eq!(record.advance(&seen(&[document.revision]), later + HOUR), None, "a relay still seals with it");
    assert_eq!(record.advance(&seen(&[0]), later), None, "a relay of the version before");
    assert!(record.advance(&seen(&[0]), now + 60_000).is_some());
    let left = record.advance(&Seen { records: Some(sealed(1)), ..told }, later).expect("left");
    assert_eq!(states(&left, Ring::Record), [(1, KeyState::Newest)]);
}

#[test]
fn secrets_of_the_version_before_live_a_month() {
    let before = r#"{"revision":5,"realm":"r","rest_secrets":[{"id":0,"value":"b25l"}],
        "generated_rest_secret":"b25l","nonce_keys":[{"id":0,"value":"Tg=="}],"record_keys":[{"id":0,"value":"Ug=="}]}"#;
    let document = Document::from_json(before.as_bytes()).expect("read");
    assert_eq!(document.ring(Ring::Rest)[0].origin(), Origin::Made);
    let now = 1_700_000_000_000;
    let rest = rotated(&document, Ring::Rest, now);
    assert_eq!(rest.advance(&seen(&[]), now + 29 * 24 * HOUR), None);
    assert!(rest.advance(&seen(&[]), now + 31 * 24 * HOUR).is_some());
}

#[test]
fn what_a_newer_version_wrote_is_kept() {
    let newer = r#"{"revision":5,"realm":"r","rest_secrets":[{"id":0,"value":"b25l","hardware":true}],
        "nonce_keys":[{"id":0,"value":"Tg=="}],"record_keys":[{"id":0,"value":"Ug=="}],"links":{"keys":[1]}}"#;
    let document = Document::from_json(newer.as_bytes()).expect("read");
    let json = String::from_utf8(rotated(&document, Ring::Nonce, 9).to_json()).expect("UTF-8");
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["links"]["keys"][0], 1);
    assert_eq!(json["rest_secrets"][0]["hardware"], true);
}

#[test]
fn ids_come_back_last_and_never_twice() {
    let mut document = fresh();
    let mut now = document.revision;
    let mut given = vec![0];
    for _ in 0..600 {
        now += 2 * HOUR;
        document = document.advance(&seen(&[]), now).unwrap_or(document);
        document = rotated(&document, Ring::Nonce, now);
        let id = document.ring(Ring::Nonce)[0].id;
        let recent = given.len().saturating_sub(240);
        assert!(!given[recent..].contains(&id), "{id} was given out a short time ago");
        given.push(id);
    }
}

/// What may happen next.
#[derive(Clone, Debug)]
enum Event {
    Rotate(Ring),
    /// A relay hears what is stored.
    Hear(usize),
    /// A relay says what it has.
    Report(usize),
    /// The keeper looks; it may be another one each time.
    Step,
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let ring = prop_oneof![Just(Ring::Rest), Just(Ring::Nonce), Just(Ring::Record)];
    prop_oneof![
        2 => ring.prop_map(Event::Rotate),
        6 => (0..RELAYS).prop_map(Event::Hear),
        6 => (0..RELAYS).prop_map(Event::Report),
        6 => Just(Event::Step),
        3 => (0..2_000_u64).prop_map(Event::Pass),
        1 => (0..30 * HOUR).prop_map(Event::Pass),
    ]
}

const RELAYS: usize = 3;

#[derive(Clone)]
struct Relay {
    known: Document,
    reported: u64,
    /// Since when there is something newer than it knows.
    behind_since: Option<u64>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_what_is_used_is_accepted(events in prop::collection::vec(event(), 1..120)) {
        let mut stored = fresh();
        let mut now = stored.revision;
        let relay = Relay { known: stored.clone(), reported: stored.revision, behind_since: None };
        let mut relays = vec![relay; RELAYS];
        for event in events {
            let before = stored.clone();
            match event {
                Event::Rotate(ring) => match stored.begin(ring, None, now) {
                    Ok(begun) => stored = begun.unwrap_or(stored),
                    Err(refused) => prop_assert!(matches!(refused, RotateError::Full(_)), "{refused}"),
                },
                Event::Hear(n) => {
                    let reported = relays[n].reported;
                    relays[n] = Relay { known: stored.clone(), reported, behind_since: None };
                }
                Event::Report(n) => relays[n].reported = relays[n].known.revision,
                Event::Step => {
                    let reported: Vec<_> = relays.iter().map(|relay| relay.reported).collect();
                    stored = stored.advance(&seen(&reported), now).unwrap_or(stored);
                }
                Event::Pass(ms) => now += ms,
            }
            // What is stored is all there is: whoever reads it goes on.
            stored = Document::from_json(&stored.to_json()).expect("its own words");
            if stored == before {
                continue;
            }
            prop_assert!(stored.revision > before.revision);
            for relay in &mut relays {
                relay.behind_since.get_or_insert(now);
            }
            for ring in Ring::ALL {
                let keys = stored.ring(ring);
                let ids: BTreeSet<_> = keys.iter().map(|key| key.id).collect();
                prop_assert_eq!(ids.len(), keys.len());
                prop_assert!(keys.len() <= MOST);
                prop_assert!(keys[0].stage == Stage::Live);
                prop_assert!(keys.iter().filter(|key| key.stage == Stage::Next).count() <= 1);
                // Whatever was used a moment ago is accepted now.
                prop_assert!(keys.iter().any(|key| key.value == before.ring(ring)[0].value));
                let is_new = keys[0].value != before.ring(ring)[0].value;
                let waited = before.ring(ring).iter().find(|key| key.value == keys[0].value).map(|key| now - key.since);
                for relay in &relays {
                    let knows = |value: &_| relay.known.ring(ring).iter().any(|key| key.value == *value);
                    // Nobody uses a key that a relay does not know, but where that one has had its time.
                    prop_assert!(!is_new || waited.is_some_and(|ms| ms >= 3_000) || knows(&keys[0].value));
                    // What a relay mints is good everywhere, however long it takes it to hear the news, up to the life
                    // of what it mints.
                    let lags = relay.behind_since.map_or(0, |since| now - since);
                    let minted = &relay.known.ring(ring)[0].value;
                    let accepted = keys.iter().any(|key| key.value == *minted);
                    prop_assert!(ring != Ring::Nonce || lags > HOUR || accepted);
                    // What seals records leaves when nobody seals with it.
                    prop_assert!(ring != Ring::Record || accepted);
                }
            }
        }
    }
}
