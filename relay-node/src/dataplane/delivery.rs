//! Between the workers and the backbone: what arrives by it goes over a ring to the worker that has the relayed
//! address, what leaves by it goes through the worker's own end.

use std::net::SocketAddr;
use std::sync::Arc;

use turn_core::{AccountId, DropReason, Head, IpMeta, MemberId, PeerAddr, RelayedAddr};

use super::apply::Applied;
use super::counters::{Direction, Loss};
use super::fence::Fence;
use super::ingress::Ingress;
use super::packet::PacketRef;
use super::relayed::Routes;
use super::ring::{Meaning, Outbox};
use super::shard;
use super::worker::Worker;
use crate::backbone::{BackboneOutbox, Deliver, Inbound, Outbound, Usabilities, Usability};

/// What the backbone delivers into; lives on its thread.
pub struct Delivery {
    /// By worker.
    outboxes: Vec<Outbox>,
    routes: Arc<Routes>,
    fence: Arc<Fence>,
}

impl Delivery {
    pub(super) fn new(outboxes: Vec<Outbox>, routes: Arc<Routes>, fence: Arc<Fence>) -> Self {
        Self { outboxes, routes, fence }
    }
}

impl Delivery {
    /// To the worker that a client's packets are for.
    fn hand_to_client_worker(&mut self, client: SocketAddr, meaning: Meaning, packet: &[u8]) -> bool {
        let workers = u16::try_from(self.outboxes.len()).unwrap_or(u16::MAX);
        let worker = shard::worker(client, workers);
        let outbox = self.outboxes.get_mut(usize::from(worker.0));
        outbox.is_some_and(|outbox| outbox.push(meaning, [packet, &[], &[]]).is_ok())
    }
}

impl Deliver for Delivery {
    fn deliver(&mut self, what: Inbound, packet: &[u8]) -> bool {
        if self.fence.is_up() {
            return false;
        }
        match what {
            Inbound::Data { source, destination, ip, .. } => {
                let (relayed, from) = (PeerAddr::new(destination), PeerAddr::new(source));
                let Some(worker) = self.routes.worker_of(relayed) else { return false };
                let Some(outbox) = self.outboxes.get_mut(usize::from(worker.0)) else { return false };
                outbox.push(Meaning::FromPeer { relayed, from, ip }, [packet, &[], &[]]).is_ok()
            }
            Inbound::Ingress { from, client, server, ip } => {
                self.hand_to_client_worker(client, Meaning::Ingress { member: from, client, server, ip }, packet)
            }
            Inbound::IngressReply { from, client, server, ip } => {
                self.hand_to_client_worker(client, Meaning::IngressReply { member: from, client, server, ip }, packet)
            }
        }
    }

    fn flush(&mut self) {
        for outbox in &mut self.outboxes {
            outbox.wake();
        }
    }
}

/// A worker's end of the backbone.
pub(super) struct BackboneEnd {
    pub(super) outbox: BackboneOutbox,
    pub(super) usabilities: Usabilities,
    pub(super) ingress: Ingress,
}

impl Worker {
    /// From an allocation of this node to a relayed address of another member.
    pub(super) fn send_to_member(
        &mut self,
        member: MemberId,
        (via, account): (&RelayedAddr, AccountId),
        to: PeerAddr,
        head: &Head,
        payload: PacketRef,
        ip: IpMeta,
    ) -> Applied {
        let backbone = self.backbone.as_mut().filter(|end| end.usabilities.of(member) == Usability::Link);
        let Some(backbone) = backbone else {
            self.counters.dropped(DropReason::NoBackbone);
            return Applied::Dropped;
        };
        let what = Outbound::Data { member, source: via.advertised, destination: to.socket_addr(), ip };
        if backbone.outbox.push(what, [head.as_slice(), self.packets.bytes(payload)]).is_err() {
            self.counters.lost(Loss::RingFull);
            return Applied::Dropped;
        }
        self.counters.sent(Direction::ToPeer, payload.len(), account);
        Applied::Done
    }
}
