//! Who owns a relay address, and under which epoch (pure).

use super::OwnerRecord;

/// A relay that asks to own its address, from its `Hello`.
#[derive(Clone, Copy, Debug)]
pub struct Claimant<'a> {
    /// From its certificate.
    pub node_id: &'a str,
    /// Random per process.
    pub boot_id: &'a str,
    /// Epoch it took for itself at its start.
    pub claimed_epoch: u64,
    /// Whether it waits if need be.
    pub patience: Patience,
}

/// What a relay that asks for its address does if it does not get it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Patience {
    /// It ends; it is meant to be the only one with this address.
    None,
    /// It waits: another one may be serving.
    Waits {
        /// Whoever else is configured with the address is preferred.
        standby: bool,
        /// Nobody serves the address for sure ([`super::Snapshot::is_vacant`]).
        vacant: bool,
    },
}

/// `epochs/<relay address>`: the highest epoch ever granted and the process that got it, as
/// `<epoch> <boot id> <node id>`.
/// Unleased: the numbers must not restart when the owner's lease ends.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Granted {
    /// 0 if none was.
    pub epoch: u64,
    /// Empty if unknown.
    pub boot_id: String,
    /// Empty if unknown.
    pub node_id: String,
}

impl Granted {
    /// Reads the stored text. What cannot be read counts as no epoch: the claimant's own number still grows.
    pub fn from_text(text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text);
        let mut words = text.split_ascii_whitespace();
        let epoch = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let boot_id = words.next().unwrap_or_default().to_owned();
        let node_id = words.next().unwrap_or_default().to_owned();
        Self { epoch, boot_id, node_id }
    }

    /// The stored text.
    pub fn to_text(&self) -> Vec<u8> {
        format!("{} {} {}", self.epoch, self.boot_id, self.node_id).trim_end().into()
    }
}

/// The answer to a claim.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Decision {
    /// It owns the address under this epoch.
    Own {
        /// At least the claimed one.
        epoch: u64,
    },
    /// Another node holds it.
    Superseded {
        /// The holder's epoch.
        epoch: u64,
        /// The holder.
        owner: String,
    },
    /// Nobody holds it, but whoever did may still serve: it waits until that is sure.
    Unsure {
        /// The last epoch granted.
        epoch: u64,
    },
}

/// Decides a claim. Another node's living lease always wins. The same node id takes over at once, because it holds
/// the exclusive lock on its state directory: its predecessor is dead. A process that nobody has followed in the
/// meantime keeps its epoch, also when its lease had ended; every other one gets a number never granted before.
///
/// A relay that waits does not serve yet, so it takes a lease that is absent for an end only when that is sure, or when
/// it was itself the last to have the address: leases end in outages too, and the owner may be about to claim again.
pub fn decide_owner(claimant: &Claimant<'_>, stored: Option<&OwnerRecord>, granted: &Granted) -> Decision {
    if let Some(owner) = stored
        && owner.node_id != claimant.node_id
    {
        return Decision::Superseded { epoch: owner.epoch, owner: owner.node_id.clone() };
    }
    if let Patience::Waits { standby, vacant: false } = claimant.patience
        && stored.is_none()
    {
        let was_its_own = granted.boot_id == claimant.boot_id || granted.node_id == claimant.node_id;
        // Of an older controller, which wrote no name: the preferred relay may have been it, a standby was not.
        let is_likely = !standby && granted.node_id.is_empty();
        if !was_its_own && !is_likely {
            return Decision::Unsure { epoch: granted.epoch };
        }
    }
    let highest = granted.epoch.max(stored.map_or(0, |owner| owner.epoch));
    let reconnects = highest > 0 && highest == granted.epoch && granted.boot_id == claimant.boot_id;
    let floor = if reconnects { highest } else { highest.saturating_add(1) };
    Decision::Own { epoch: claimant.claimed_epoch.max(floor) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ownership() {
        let own = |epoch| Decision::Own { epoch };
        type Case = (&'static str, u64, Option<(&'static str, u64)>, (u64, &'static str), Decision);
        let cases: &[Case] = &[
            ("first of all", 1, None, (0, ""), own(1)),
            ("after a lost state directory", 1, None, (7, "old"), own(8)),
            ("after the store was lost", 9, None, (0, ""), own(9)),
            ("restart, lease still running", 8, Some(("eu-1", 7)), (7, "old"), own(8)),
            ("restart with an older state directory", 3, Some(("eu-1", 7)), (7, "old"), own(8)),
            ("reconnect", 7, Some(("eu-1", 7)), (7, "boot"), own(7)),
            ("reconnect that claims its first number", 6, Some(("eu-1", 7)), (7, "boot"), own(7)),
            ("reconnect after the lease ended", 7, None, (7, "boot"), own(7)),
            ("reconnect after another had it and left", 7, None, (8, "other"), own(9)),
            (
                "another node holds it",
                9,
                Some(("eu-2", 8)),
                (8, "other"),
                Decision::Superseded { epoch: 8, owner: "eu-2".to_owned() },
            ),
            (
                "another node holds it, whatever is claimed",
                99,
                Some(("eu-2", 8)),
                (8, "boot"),
                Decision::Superseded { epoch: 8, owner: "eu-2".to_owned() },
            ),
            ("epochs fell behind the owner", 7, Some(("eu-1", 7)), (5, "boot"), own(8)),
        ];
        for (what, claimed_epoch, owner, (epoch, boot_id), expected) in cases {
            let claimant =
                Claimant { node_id: "eu-1", boot_id: "boot", claimed_epoch: *claimed_epoch, patience: Patience::None };
            let owner = owner.map(|(node_id, epoch)| OwnerRecord {
                node_id: node_id.to_owned(),
                epoch,
                session: String::new(),
            });
            let granted = Granted { epoch: *epoch, boot_id: (*boot_id).to_owned(), node_id: String::new() };
            assert_eq!(decide_owner(&claimant, owner.as_ref(), &granted), *expected, "{what}");
        }
    }

    #[test]
    fn who_waits_takes_nothing_that_may_be_in_use() {
        type Case = (&'static str, bool, bool, &'static str, Option<u64>);
        let cases: &[Case] = &[
            ("a standby, and nobody had it ever", true, false, "", None),
            ("the same, when that is sure", true, true, "", Some(1)),
            ("the preferred one, and nobody had it ever", false, false, "", Some(1)),
            ("its own process had it last", true, false, "7 boot eu-1", Some(7)),
            ("its node had it last", true, false, "7 other eu-1", Some(8)),
            ("another node had it last, and may be alive", false, false, "7 other eu-2", None),
            ("another node had it last, and is gone", false, true, "7 other eu-2", Some(8)),
            ("a standby beside one that an older controller welcomed", true, false, "7 other", None),
            ("the preferred one, welcomed by an older controller", false, false, "7 other", Some(8)),
        ];
        for (what, standby, vacant, granted, expected) in cases {
            let patience = Patience::Waits { standby: *standby, vacant: *vacant };
            let claimant = Claimant { node_id: "eu-1", boot_id: "boot", claimed_epoch: 1, patience };
            let granted = Granted::from_text(granted.as_bytes());
            let expected = match expected {
                Some(epoch) => Decision::Own { epoch: *epoch },
                None => Decision::Unsure { epoch: granted.epoch },
            };
            assert_eq!(decide_owner(&claimant, None, &granted), expected, "{what}");
            // Another node's living lease wins whatever is believed.
            let owner = OwnerRecord { node_id: "eu-2".to_owned(), epoch: 7, session: String::new() };
            let superseded = Decision::Superseded { epoch: 7, owner: "eu-2".to_owned() };
            assert_eq!(decide_owner(&claimant, Some(&owner), &granted), superseded, "{what}");
        }
    }

    #[test]
    fn granted_epochs_are_readable_text() {
        let granted = Granted { epoch: 12, boot_id: "ab12".to_owned(), node_id: "eu-1".to_owned() };
        assert_eq!(granted.to_text(), b"12 ab12 eu-1");
        assert_eq!(Granted::from_text(b"12 ab12 eu-1"), granted);
        let older = Granted { node_id: String::new(), ..granted };
        assert_eq!((older.to_text(), Granted::from_text(b"12 ab12")), (b"12 ab12".to_vec(), older));
        assert_eq!(Granted::from_text(b"12\n"), Granted { epoch: 12, ..Granted::default() });
        assert_eq!(Granted::from_text(b"\xff"), Granted::default());
    }
}
