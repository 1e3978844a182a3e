//! A relay that waits for its address: from Hello to the moment nobody else owns it.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tonic::Status;
use turnpike_proto::v1::{self, controller_message::Body, relay_message};

use super::session::{End, Joining};
use super::status;
use crate::fleet::{Claim, ClaimError, Lost, NodeRecord, Patience, Post, owner_key};
use crate::store::StoreError;

/// Between two looks while the address is nobody's for the store, but may be served.
const LOOK: Duration = Duration::from_millis(100);
/// How long a relay that is preferred has to claim an address that has come free.
const COURTESY: Duration = Duration::from_secs(1);

impl Joining {
    /// Claims the address for a relay that waits if need be; its session is open all the while, and it is told who owns
    /// the address. Of several that wait one claims, and the others go on waiting for it.
    pub(super) async fn claim(&mut self, hello: &v1::Hello, record: NodeRecord) -> Result<Claim, End> {
        if !hello.waits {
            return self.take(hello, &record, Patience::None).await.map_err(refused);
        }
        let address = record.relay_address;
        let mut post = Post::new(self.store.clone(), record.clone(), self.options.lease);
        let mut changes = self.store.watch(&owner_key(address)).await.map_err(|error| status(&error))?;
        let mut closing = self.closing.clone();
        let silence = self.options.lease * 2;
        let mut silent = Instant::now() + silence;
        let mut held: Option<Instant> = None;
        let mut free_since: Option<Instant> = None;
        let mut told: Option<v1::Waiting> = None;
        let claimed = loop {
            let owner = match self.attempt(hello, &record, &post, &mut free_since).await {
                Ok(claim) => break Ok(claim),
                Err(ClaimError::Superseded { epoch, owner }) => Some(v1::Waiting { owner, epoch }),
                // In a moment it is known who has it next, most often this one.
                Err(ClaimError::Unsure { .. }) if told.is_some() => None,
                Err(ClaimError::Unsure { epoch }) => Some(v1::Waiting { owner: String::new(), epoch }),
                Err(ClaimError::Store(error)) if told.is_none() => break Err(status(&error).into()),
                Err(ClaimError::Store(error)) => {
                    tracing::debug!(node = self.node_id, %error, "waiting for the store");
                    None
                }
            };
            let is_taken = owner.as_ref().is_some_and(|owner| !owner.owner.is_empty());
            if let Some(owner) = owner.filter(|owner| told.as_ref() != Some(owner)) {
                tracing::info!(node = self.node_id, owner = owner.owner, epoch = owner.epoch, "a relay waits");
                if let Err(end) = self.say(Body::Waiting(owner.clone())).await {
                    break Err(end);
                }
                told = Some(owner);
            }
            if held.is_none_or(|held| held.elapsed() >= self.options.lease / 3) {
                // What cannot be held now is held at the next look.
                held = post.hold().await.is_ok().then(Instant::now);
            }
            let again = Instant::now() + if is_taken { self.options.lease / 4 } else { LOOK };
            tokio::select! {
                message = self.inbound.message() => {
                    silent = Instant::now() + silence;
                    match message.map(|message| message.map(|message| message.body)) {
                        Ok(Some(Some(relay_message::Body::Goodbye(_)))) => break Err(End::Left),
                        Ok(Some(_)) => {}
                        Ok(None) => break Err(Status::cancelled("the relay closed its stream").into()),
                        Err(status) => break Err(status.into()),
                    }
                }
                event = changes.recv() => if event.is_none() { break Err(End::Closing) },
                () = sleep_until(again) => {}
                () = sleep_until(silent) => break Err(Status::deadline_exceeded("the relay is silent").into()),
                _ = closing.changed() => break Err(End::Closing),
            }
        };
        post.leave().await;
        claimed
    }

    /// One attempt to claim. A standby lets preferred relays go first for a while, also one that has just handed the
    /// address over and asks anew.
    async fn attempt(
        &self,
        hello: &v1::Hello,
        record: &NodeRecord,
        post: &Post,
        free_since: &mut Option<Instant>,
    ) -> Result<Claim, ClaimError> {
        let address = record.relay_address;
        if hello.standby {
            if self.store.get(&owner_key(address)).await?.is_some() {
                *free_since = None;
            } else if free_since.get_or_insert_with(Instant::now).elapsed() < COURTESY && post.yields().await? {
                return Err(ClaimError::Unsure { epoch: hello.claimed_epoch });
            }
        }
        let patience = Patience::Waits { standby: hello.standby, vacant: self.fleet.snapshot().is_vacant(address) };
        self.take(hello, record, patience).await
    }

    async fn take(&self, hello: &v1::Hello, record: &NodeRecord, patience: Patience) -> Result<Claim, ClaimError> {
        let claim = Claim::take(self.store.clone(), record.clone(), hello.claimed_epoch, patience, self.options.lease);
        tokio::select! {
            biased;
            // A store that was away may answer much later. The claim of a process that is gone by then would supersede
            // the one that has followed it.
            () = self.out.closed() => Err(StoreError::Unavailable("the relay is gone".to_owned()).into()),
            claim = claim => claim,
        }
    }
}

fn refused(error: ClaimError) -> End {
    match error {
        ClaimError::Superseded { epoch, owner } => End::Lost(Lost::Superseded { epoch, owner }),
        ClaimError::Unsure { .. } => Status::unavailable(error.to_string()).into(),
        ClaimError::Store(error) => End::Broken(status(&error)),
    }
}
