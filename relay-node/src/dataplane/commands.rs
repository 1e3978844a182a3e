//! What other threads ask of a worker, and how it obeys: between packets, never in the middle of a turn.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use turn_core::{AllocationId, Input, MemberId, Record, Settings};

use super::delivery::BackboneEnd;
use super::ring::Inbox;
use super::worker::{Worker, read_clocks};
use crate::journal::{Journal, Succession};

/// Records restored in one turn while clients are served: each opens a socket.
const RESTORE_BUDGET: usize = 32;

/// What other threads ask of a worker.
pub(super) enum Command {
    /// Restore these and journal them; then say so. Nothing is read before [`Command::Serve`].
    Begin {
        epoch: u64,
        records: Vec<Record>,
        succession: Arc<Succession>,
        ready: Sender<()>,
    },
    /// Every worker has done that.
    Serve(Arc<Settings>),
    Configure(Arc<Settings>),
    Own(u64),
    Revoke(AllocationId),
    Restore(Vec<Record>),
    Records(oneshot::Sender<Vec<Record>>),
    EndSessions(oneshot::Sender<()>),
    /// To be answered when what this turn sends has left.
    FinishTurn(oneshot::Sender<()>),
    /// What other members send comes by this ring.
    HearBackbone(Inbox),
    /// Who has the allocation of a client that was asked about.
    Located {
        client: SocketAddr,
        member: Option<MemberId>,
    },
    /// Packets for other members leave this way.
    JoinBackbone(Box<BackboneEnd>),
    Stop,
}

impl Worker {
    /// Waits for the word to read, for `patience` at most. False where there is nothing to be served.
    pub(super) fn await_beginning(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            match self.commands.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
                Ok(command) => {
                    self.now = read_clocks();
                    let serves = matches!(command, Command::Serve(_));
                    self.obey(command);
                    if serves {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
        // To wait is not to stand still.
        self.pause.turn();
        true
    }

    /// From now on changes are journaled. What was restored before is in the journal already, or has ended.
    pub(super) fn keep_journal(&mut self, open: impl FnOnce(&mut dyn Iterator<Item = Record>) -> Journal) {
        let mut records = self.server.records(self.now);
        self.journal = Some(open(&mut records));
    }

    /// Commands, up to one that takes longer than a turn.
    pub(super) fn obey_commands(&mut self) {
        self.restore_late();
        while self.late.is_empty()
            && let Ok(command) = self.commands.try_recv()
        {
            self.obey(command);
        }
        self.unfinished |= !self.late.is_empty();
    }

    fn obey(&mut self, command: Command) {
        let input = match command {
            Command::Begin { epoch, records, succession, ready } => {
                self.own(epoch);
                self.restore(records);
                let (id, now) = (self.id, self.now.mono);
                self.keep_journal(|records| succession.open(id, records, now));
                self.pause.turn();
                // Whoever looks at a relay that is ready sees how it stands with its journal.
                self.publish();
                // Nobody waits any more: the start has failed elsewhere.
                let _ = ready.send(());
                return;
            }
            Command::Serve(settings) | Command::Configure(settings) => Input::Configure(settings),
            Command::Own(epoch) => return self.own(epoch),
            Command::Revoke(id) => Input::Revoke(id),
            Command::Restore(records) => {
                self.late.extend(records);
                self.unfinished = true;
                return;
            }
            Command::Records(answer) => {
                self.changes.seal();
                // Nobody waits any more: nothing to do.
                let _ = answer.send(self.server.records(self.now).collect());
                return;
            }
            Command::EndSessions(answer) => {
                self.end_sessions();
                // As above.
                let _ = answer.send(());
                return;
            }
            Command::FinishTurn(answer) => {
                self.finishing.push(answer);
                return;
            }
            Command::HearBackbone(inbox) => {
                self.inboxes.push(inbox);
                // It may have been pushed to before anybody looked.
                self.unfinished = true;
                return;
            }
            Command::Located { client, member } => {
                let now = self.now.mono;
                if let Some(backbone) = &mut self.backbone {
                    backbone.ingress.located(client, member, now);
                }
                return;
            }
            Command::JoinBackbone(end) => {
                self.backbone = Some(end);
                return;
            }
            Command::Stop => {
                self.stopped = true;
                return;
            }
        };
        self.handle(input);
    }

    fn own(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.handle(Input::Own { epoch });
    }

    fn restore_late(&mut self) {
        let few = self.late.len().min(RESTORE_BUDGET);
        let records = self.late.drain(..few).collect();
        self.restore(records);
    }
}
