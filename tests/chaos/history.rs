//! What etcd's history tells: no record goes back, none comes back, none is written without an owner (pure).

use std::collections::HashMap;

use harness::etcd::PREFIX;
use turn_core::{KeyRing, Record};

use crate::evidence::Written;

/// What is known of a relay address as history goes on.
#[derive(Default)]
struct Address {
    /// Node and epoch of the living owner.
    owner: Option<(String, u64)>,
    /// The last one there was.
    last: Option<(String, u64)>,
    /// First epoch under which the present node owns it without a break.
    since: u64,
    granted: u64,
}

/// A record, as far as history has come.
#[derive(Clone, Copy)]
struct Known {
    version: (u64, u64),
    expires_at: u64,
    stored: bool,
}

/// What in this history must not be.
pub(crate) fn check(history: &[Written]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut addresses: HashMap<String, Address> = HashMap::new();
    let mut records: HashMap<String, Known> = HashMap::new();
    for written in history {
        let Some(key) = written.key.strip_prefix(PREFIX) else { continue };
        let mut say = |what: String| wrong.push(format!("revision {}: {key}: {what}", written.revision));
        let mut path = key.splitn(3, '/');
        let (Some(kind), Some(name)) = (path.next(), path.next()) else { continue };
        let address = addresses.entry(name.to_owned());
        match (kind, &written.value) {
            ("owners", value) => {
                if let Err(what) = address.or_default().owned(value.as_deref()) {
                    say(what);
                }
            }
            ("epochs", Some(value)) => {
                let text = String::from_utf8_lossy(value);
                let epoch = text.split_ascii_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
                let address = address.or_default();
                if epoch < address.granted {
                    say(format!("epoch {epoch} after {}", address.granted));
                }
                address.granted = epoch;
            }
            ("epochs", None) => say("epochs are never deleted".to_owned()),
            ("allocations", value) => {
                let address = address.or_default();
                let before = records.get(key).copied();
                match put(address, before, value.as_deref()) {
                    Ok(known) => drop(records.insert(key.to_owned(), known)),
                    Err(what) => say(what),
                }
            }
            _ => {}
        }
    }
    wrong
}

impl Address {
    fn owned(&mut self, value: Option<&[u8]>) -> Result<(), String> {
        let Some(value) = value else {
            self.owner = None;
            return Ok(());
        };
        let text: serde_json::Value = serde_json::from_slice(value).map_err(|error| error.to_string())?;
        let node = text["node_id"].as_str().unwrap_or_default().to_owned();
        let epoch = text["epoch"].as_u64().unwrap_or(0);
        let last = self.last.replace((node.clone(), epoch));
        let held = self.owner.replace((node.clone(), epoch));
        if last.as_ref().is_none_or(|(before, _)| *before != node) {
            self.since = epoch;
        }
        match (last, held) {
            (Some((_, before)), _) if epoch < before => Err(format!("epoch {epoch} of {node} after {before}")),
            (Some((other, before)), _) if other != node && epoch == before => {
                Err(format!("{node} and {other} have the same epoch {epoch}"))
            }
            (_, Some((other, _))) if other != node => Err(format!("{node} took it from {other}, whose lease lived")),
            _ => Ok(()),
        }
    }
}

/// A write of a record, or of its end.
fn put(address: &Address, before: Option<Known>, value: Option<&[u8]>) -> Result<Known, String> {
    let owner = address.owner.as_ref();
    let Some(value) = value else {
        let known = before.unwrap_or(Known { version: (0, 0), expires_at: 0, stored: false });
        // The sweeper removes what has expired of those that are gone; nothing expires in a run of chaos.
        return match owner {
            Some(_) => Ok(Known { stored: false, ..known }),
            None => Err(format!("deleted while nobody owned the address (expiry {})", known.expires_at)),
        };
    };
    // An empty ring checks no seal.
    let record = Record::open(value, &KeyRing::default()).map_err(|error| error.to_string())?;
    let version = (record.epoch, record.sequence);
    let known = Known { version, expires_at: record.expires_at, stored: true };
    let Some((node, epoch)) = owner else {
        return Err(format!("{version:?} was written while nobody owned the address"));
    };
    if version.0 > *epoch {
        return Err(format!("epoch {} was written while {node} owned it under {epoch}", version.0));
    }
    match before {
        Some(before) if version < before.version => Err(format!("{version:?} over {:?}", before.version)),
        Some(before) if version == before.version && !before.stored => {
            Err(format!("{version:?} is back after it was deleted"))
        }
        // Another node takes over what the store has, and nothing that it has not.
        _ if version.0 < address.since && before.is_none_or(|before| version > before.version) => Err(format!(
            "{version:?} is new, but of an epoch before {node} took the address over under {}",
            address.since
        )),
        _ => Ok(known),
    }
}
