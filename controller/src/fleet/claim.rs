//! A relay's hold on its address: `nodes/`, `owners/` and `load/` on one lease, and every write fenced by the exact
//! value of the owner key.
//!
//! The owner's value carries a token that is new in every session and is drawn anew after every write of unknown
//! outcome. So neither an older session (of an older epoch, or of the same process on another replica) nor a delayed
//! copy of an older transaction can land after what was written later.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::RwLock;
use tokio::time::sleep;

use super::{Claimant, Decision, Granted, LoadRecord, NodeRecord, OwnerRecord, Patience, decide_owner, unix_ms};
use crate::store::{Entry, Guard, LeaseId, Op, Store, StoreError};

/// Attempts to claim against others that claim at the same time.
const ATTEMPTS: usize = 10;
/// Pauses between attempts to reach a store that is away: first and longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// Why a relay could not claim its address.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// Another node owns it.
    #[error("{owner} owns the relay address under epoch {epoch}")]
    Superseded {
        /// Its epoch.
        epoch: u64,
        /// Its node id.
        owner: String,
    },
    /// Nobody holds it for the store, but whoever did may still serve.
    #[error("who had the relay address last, under epoch {epoch}, may still serve")]
    Unsure {
        /// The last epoch granted.
        epoch: u64,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a claim is over.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Lost {
    /// Another process owns the address, under a higher epoch.
    #[error("{owner} owns the relay address under epoch {epoch}")]
    Superseded {
        /// Its epoch.
        epoch: u64,
        /// Its node id.
        owner: String,
    },
    /// The same process has opened another session, or has to claim anew.
    #[error("another session of this relay has taken over")]
    Replaced,
    /// The store refuses what was to be written.
    #[error("{0}")]
    Refused(String),
}

/// What became of a report.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reported {
    /// The store has it, and the lease runs anew.
    Stored,
    /// The lease runs anew, but the store takes no changes.
    Renewed,
    /// The store did not answer: the lease runs out.
    Not,
}

/// A relay's hold on its address, as one session has it.
pub struct Claim {
    store: Arc<dyn Store>,
    ttl: Duration,
    relay_address: IpAddr,
    node_id: String,
    epoch: u64,
    standing: RwLock<Standing>,
}

/// What the store is believed to hold.
struct Standing {
    record: NodeRecord,
    /// The owner key's exact value.
    owner: Vec<u8>,
    load: LoadRecord,
    /// Tokens that the owner key may carry: one, and more while a write of it is of unknown outcome.
    tokens: Vec<String>,
    /// Grows with each recovery.
    generation: u64,
}

enum Recovery {
    Again(StoreError),
    Over(Lost),
}

impl From<StoreError> for Recovery {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Refused(text) => Self::Over(Lost::Refused(text)),
            passing => Self::Again(passing),
        }
    }
}

impl Claim {
    /// Claims `record.relay_address` for `record.node_id`; see [`decide_owner`]. The same process keeps its lease.
    ///
    /// # Errors
    /// See [`ClaimError`].
    pub async fn take(
        store: Arc<dyn Store>,
        mut record: NodeRecord,
        claimed_epoch: u64,
        patience: Patience,
        ttl: Duration,
    ) -> Result<Self, ClaimError> {
        let keys = Keys::of(&record);
        let mut granted_lease = None;
        for _ in 0..ATTEMPTS {
            // At once: a slow store is asked for the fewest rounds. The guards see to it that they belong together.
            let (owner, granted, node, load) = tokio::try_join!(
                store.get(&keys.owner),
                store.get(&keys.epoch),
                store.get(&keys.node),
                store.get(&keys.load),
            )?;
            let claimant = Claimant { node_id: &record.node_id, boot_id: &record.boot_id, claimed_epoch, patience };
            let last = granted.as_ref().map(|entry| Granted::from_text(&entry.value)).unwrap_or_default();
            let stored_owner = owner.as_ref().and_then(read::<OwnerRecord>);
            let epoch = match decide_owner(&claimant, stored_owner.as_ref(), &last) {
                Decision::Own { epoch } => epoch,
                Decision::Superseded { epoch, owner } => return Err(ClaimError::Superseded { epoch, owner }),
                Decision::Unsure { epoch } => return Err(ClaimError::Unsure { epoch }),
            };

            let before = node.as_ref().and_then(read::<NodeRecord>);
            let own = before.as_ref().filter(|before| before.boot_id == record.boot_id);
            let lease = match (granted_lease, own) {
                (Some(lease), _) => lease,
                (None, Some(own)) if store.keep_alive(LeaseId(own.lease)).await.is_ok() => LeaseId(own.lease),
                (None, _) => *granted_lease.insert(store.grant(ttl).await?),
            };
            record.lease = lease.0;
            if let Some(own) = own {
                record.registered_at = own.registered_at;
            }
            let load = load.as_ref().filter(|_| own.is_some()).and_then(read::<LoadRecord>);
            let load = LoadRecord { suspect: false, reported_at: unix_ms(), ..load.unwrap_or_default() };
            let token = token()?;
            let standing = Standing {
                owner: owner_value(&record.node_id, epoch, &token),
                record: record.clone(),
                load,
                tokens: vec![token],
                generation: 0,
            };
            let guards = vec![
                unchanged(&keys.owner, owner.as_ref()),
                unchanged(&keys.epoch, granted.as_ref()),
                unchanged(&keys.node, node.as_ref()),
            ];
            let last = Granted { epoch, boot_id: record.boot_id.clone(), node_id: record.node_id.clone() };
            let mut ops = standing.leased(&keys, lease);
            ops.push(Op::Put { key: keys.epoch.clone(), value: last.to_text(), lease: None });
            if store.transact(guards, ops).await? {
                if let Some(old) = before.map(|before| LeaseId(before.lease)).filter(|old| *old != lease) {
                    // What still hangs on it is of the node's last process, e.g. an address it no longer has.
                    if let Err(error) = store.revoke(old).await {
                        tracing::debug!(%error, "the lease of the relay's last process runs out by itself");
                    }
                }
                return Ok(Self {
                    store,
                    ttl,
                    relay_address: record.relay_address,
                    node_id: record.node_id,
                    epoch,
                    standing: RwLock::new(standing),
                });
            }
        }
        Err(StoreError::Unavailable("others keep claiming the same relay address".to_owned()).into())
    }

    /// Epoch under which the address is owned.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The address.
    pub fn relay_address(&self) -> IpAddr {
        self.relay_address
    }

    /// Writes under the claim's fence. Returns when the store has it, however long it is away meanwhile.
    ///
    /// # Errors
    /// See [`Lost`]; nothing has been written then, or nothing that will stay.
    pub async fn write(&self, ops: Vec<Op>) -> Result<(), Lost> {
        loop {
            let generation = {
                let standing = self.standing.read().await;
                let guard = Guard::Value(self.keys().owner, standing.owner.clone());
                match self.store.transact(vec![guard], ops.clone()).await {
                    Ok(true) => return Ok(()),
                    Err(StoreError::Refused(text)) => return Err(Lost::Refused(text)),
                    // Nothing was written, so there is nothing to fence off.
                    Err(StoreError::Full(_) | StoreError::Denied(_)) => None,
                    Ok(false) | Err(_) => Some(standing.generation),
                }
            };
            match generation {
                Some(generation) => self.recover(generation).await?,
                None => sleep(PAUSE.1).await,
            }
        }
    }

    /// Renews the lease and stores a report. An ended lease is granted anew; the next report goes on from there.
    ///
    /// # Errors
    /// See [`Lost`].
    pub async fn report(&self, load: LoadRecord) -> Result<Reported, Lost> {
        let (renewed, stored, generation) = {
            let standing = self.standing.read().await;
            let lease = LeaseId(standing.record.lease);
            let renewed = self.store.keep_alive(lease).await;
            let stored = match &renewed {
                Ok(()) => {
                    let guard = Guard::Value(self.keys().owner, standing.owner.clone());
                    self.store.transact(vec![guard], vec![put(&self.keys().load, &load, lease)]).await
                }
                Err(error) => Err(error.clone()),
            };
            (renewed.is_ok(), stored, standing.generation)
        };
        match stored {
            Ok(true) => {
                self.standing.write().await.load = load;
                return Ok(Reported::Stored);
            }
            Ok(false) | Err(StoreError::LeaseEnded) => self.recover(generation).await?,
            Err(StoreError::Refused(text)) => return Err(Lost::Refused(text)),
            // An old report that lands late does no harm, so there is nothing to fence.
            Err(_) => {}
        }
        Ok(if renewed { Reported::Renewed } else { Reported::Not })
    }

    /// Marks the node suspect: its stream broke. One attempt, and none if another session has it by now.
    pub async fn suspect(&self) {
        let standing = self.standing.read().await;
        let load = LoadRecord { suspect: true, ..standing.load.clone() };
        let guard = Guard::Value(self.keys().owner, standing.owner.clone());
        let put = put(&self.keys().load, &load, LeaseId(standing.record.lease));
        if let Err(error) = self.store.transact(vec![guard], vec![put]).await {
            tracing::debug!(%error, "a relay whose stream broke could not be marked");
        }
    }

    /// Gives the address up: the node leaves at once instead of when its lease runs out.
    pub async fn release(&self) {
        let standing = self.standing.read().await;
        if let Err(error) = self.store.revoke(LeaseId(standing.record.lease)).await {
            tracing::debug!(%error, "the lease of a relay that left runs out by itself");
        }
    }

    fn keys(&self) -> Keys {
        Keys::new(&self.node_id, self.relay_address)
    }

    /// After a write that did not land for sure: finds out who owns the address and, if it is still ours, fences off
    /// what may be under way. Once for all writers that failed in the same `generation`. Between attempts the claim is
    /// free for reports: they renew the lease of a store that only takes no changes.
    async fn recover(&self, generation: u64) -> Result<(), Lost> {
        let mut pause = PAUSE.0;
        loop {
            {
                let mut standing = self.standing.write().await;
                if standing.generation != generation {
                    return Ok(());
                }
                match self.regain(&mut standing).await {
                    Ok(()) => {
                        standing.generation += 1;
                        return Ok(());
                    }
                    Err(Recovery::Over(lost)) => return Err(lost),
                    Err(Recovery::Again(error)) => {
                        tracing::debug!(node = self.node_id, %error, "waiting for the store");
                    }
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    async fn regain(&self, standing: &mut Standing) -> Result<(), Recovery> {
        let keys = self.keys();
        let token = token()?;
        let value = owner_value(&self.node_id, self.epoch, &token);
        let Some(entry) = self.store.get(&keys.owner).await? else {
            return self.register_again(standing, &keys, token, value).await;
        };
        let owner = read::<OwnerRecord>(&entry)
            .ok_or_else(|| Recovery::Over(Lost::Refused(format!("{} cannot be read", keys.owner))))?;
        if owner.node_id != self.node_id || owner.epoch > self.epoch {
            let OwnerRecord { node_id: owner, epoch, .. } = owner;
            return Err(Recovery::Over(Lost::Superseded { epoch, owner }));
        }
        if owner.epoch < self.epoch || !standing.tokens.contains(&owner.session) {
            return Err(Recovery::Over(Lost::Replaced));
        }
        standing.tokens.push(token.clone());
        let guard = Guard::Value(keys.owner.clone(), entry.value);
        let lease = LeaseId(standing.record.lease);
        let put = Op::Put { key: keys.owner, value: value.clone(), lease: Some(lease) };
        if !self.store.transact(vec![guard], vec![put]).await? {
            return Err(Recovery::Again(StoreError::Unavailable("the owner key changed meanwhile".to_owned())));
        }
        standing.tokens = vec![token];
        standing.owner = value;
        Ok(())
    }

    /// The lease has ended, in an outage of the store: everything on it is made again under the same epoch, unless
    /// somebody was granted the address since.
    async fn register_again(
        &self,
        standing: &mut Standing,
        keys: &Keys,
        token: String,
        value: Vec<u8>,
    ) -> Result<(), Recovery> {
        let granted = self.store.get(&keys.epoch).await?;
        let last = granted.as_ref().map(|entry| Granted::from_text(&entry.value)).unwrap_or_default();
        if last.epoch > self.epoch || (last.epoch == self.epoch && last.boot_id != standing.record.boot_id) {
            return Err(Recovery::Over(Lost::Replaced));
        }
        let lease = self.store.grant(self.ttl).await?;
        standing.tokens.push(token.clone());
        let again = Standing {
            record: NodeRecord { lease: lease.0, ..standing.record.clone() },
            owner: value,
            load: standing.load.clone(),
            tokens: vec![token],
            generation: standing.generation,
        };
        let node_id = self.node_id.clone();
        let last = Granted { epoch: self.epoch, boot_id: again.record.boot_id.clone(), node_id };
        let mut ops = again.leased(keys, lease);
        ops.push(Op::Put { key: keys.epoch.clone(), value: last.to_text(), lease: None });
        let guards = vec![Guard::Absent(keys.owner.clone()), unchanged(&keys.epoch, granted.as_ref())];
        match self.store.transact(guards, ops).await {
            Ok(true) => {
                tracing::info!(node = self.node_id, epoch = self.epoch, "a relay's ended lease was granted anew");
                *standing = again;
                Ok(())
            }
            Ok(false) => Err(Recovery::Again(StoreError::LeaseEnded)),
            Err(error) => {
                // If it did apply, the next look finds our token, on this lease.
                standing.record.lease = lease.0;
                Err(error.into())
            }
        }
    }
}

impl Standing {
    /// Everything that hangs on the lease.
    fn leased(&self, keys: &Keys, lease: LeaseId) -> Vec<Op> {
        vec![
            put(&keys.node, &self.record, lease),
            put(&keys.load, &self.load, lease),
            Op::Put { key: keys.owner.clone(), value: self.owner.clone(), lease: Some(lease) },
        ]
    }
}

struct Keys {
    node: String,
    owner: String,
    load: String,
    epoch: String,
}

impl Keys {
    fn of(record: &NodeRecord) -> Self {
        Self::new(&record.node_id, record.relay_address)
    }

    fn new(node_id: &str, relay_address: IpAddr) -> Self {
        Self {
            node: format!("nodes/{node_id}"),
            owner: owner_key(relay_address),
            load: format!("load/{node_id}"),
            epoch: format!("epochs/{relay_address}"),
        }
    }
}

/// Key of the owner of a relay address.
pub(crate) fn owner_key(relay_address: IpAddr) -> String {
    format!("owners/{relay_address}")
}

fn owner_value(node_id: &str, epoch: u64, token: &str) -> Vec<u8> {
    let owner = OwnerRecord { node_id: node_id.to_owned(), epoch, session: token.to_owned() };
    json(&owner)
}

fn put(key: &str, value: &impl serde::Serialize, lease: LeaseId) -> Op {
    Op::Put { key: key.to_owned(), value: json(value), lease: Some(lease) }
}

/// Our records have no part that JSON cannot write.
fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

fn read<T: serde::de::DeserializeOwned>(entry: &Entry) -> Option<T> {
    serde_json::from_slice(&entry.value).ok()
}

fn unchanged(key: &str, entry: Option<&Entry>) -> Guard {
    match entry {
        Some(entry) => Guard::Value(key.to_owned(), entry.value.clone()),
        None => Guard::Absent(key.to_owned()),
    }
}

fn token() -> Result<String, StoreError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| StoreError::Refused(format!("no random numbers: {error}")))?;
    Ok(format!("{:016x}", u64::from_be_bytes(random)))
}
