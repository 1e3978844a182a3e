//! What a worker counts: plain integers of its own, copied out once a second.

use std::sync::Arc;

pub(super) use turn_core::meter::Direction;
use turn_core::wire::{Class, ErrorCode, Message, Method};
use turn_core::{AccountId, DropReason};

use super::WorkerSnapshot;
use crate::accounts::Accounts;

/// Why a packet, frame or record came to nothing outside of the core.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Loss {
    /// The ring to another worker was full.
    RingFull,
    /// The socket's send buffer was full.
    SendBuffer,
    /// The kernel refused the datagram: no route, forbidden, unreachable.
    SendRefused,
    /// A stream connection does not take what is sent to it.
    StreamQueue,
    /// The connection was gone.
    StreamClosed,
    /// More connections than allowed.
    Connections,
    /// A restored record is not of this node's addresses.
    RestoreForeign,
    /// The address of a restored record cannot be held.
    RestoreAddress,
    /// A restored record is of an allocation that has ended here.
    RestoreEnded,
    /// A DTLS record of no session, or a ClientHello with numbers that none begins with.
    DtlsNoSession,
    /// As many DTLS sessions as allowed.
    DtlsSessions,
    /// As many DTLS handshakes as allowed: the oldest ended.
    DtlsHandshakes,
    /// Too many DTLS handshakes at once: a datagram of one was not kept.
    DtlsWaiting,
    /// A datagram with a PROXY header that is broken, or of a source that is not trusted.
    ProxyHeader,
    /// The relay address is not this relay's for sure.
    Fenced,
}

/// Labels of [`Counters::dropped`]: the core's reasons, then ours.
const LABELS: [&str; 33] = [
    "malformed",
    "no_allocation",
    "no_channel",
    "no_permission",
    "forbidden_peer",
    "nobody_there",
    "family_mismatch",
    "no_backbone",
    "unexpected",
    "too_long",
    "not_ready",
    "peer_connections",
    "bandwidth",
    "icmp_rate",
    "too_many_strangers",
    "amplification",
    "packet_rate",
    "other",
    "ring_full",
    "send_buffer",
    "send_refused",
    "stream_queue",
    "stream_closed",
    "connections",
    "restore_foreign",
    "restore_address",
    "restore_ended",
    "dtls_no_session",
    "dtls_sessions",
    "dtls_handshakes",
    "dtls_waiting",
    "proxy_header",
    "fenced",
];
const OTHER: usize = 17;

/// The counters.
pub(super) struct Counters {
    packets: [u64; 2],
    bytes: [u64; 2],
    dropped: [u64; LABELS.len()],
    answers: Vec<(&'static str, u16, u64)>,
    pub(super) crossed: u64,
    pub(super) hello_verify_requests: u64,
    /// What each allocation has sent. None where nothing is to be counted.
    accounts: Option<Arc<Accounts>>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            packets: [0; 2],
            bytes: [0; 2],
            dropped: [0; LABELS.len()],
            answers: Vec::new(),
            crossed: 0,
            hello_verify_requests: 0,
            accounts: None,
        }
    }
}

impl Counters {
    /// Counters that also count for these accounts.
    pub(super) fn new(accounts: Arc<Accounts>) -> Self {
        Self { accounts: Some(accounts), ..Self::default() }
    }

    /// The kernel, or another allocation, took a packet with this many bytes of application data.
    pub(super) fn sent(&mut self, direction: Direction, bytes: usize, account: AccountId) {
        self.relayed(direction, bytes);
        self.pay(direction, 1, bytes as u64, account);
    }

    /// Charges what was taken.
    pub(super) fn pay(&self, direction: Direction, packets: u64, bytes: u64, account: AccountId) {
        if let Some(accounts) = &self.accounts {
            accounts.add(account, direction, packets, bytes);
        }
    }

    /// The kernel, or another worker, took a packet with this many bytes of application data.
    pub(super) fn relayed(&mut self, direction: Direction, bytes: usize) {
        self.packets[direction as usize] += 1;
        self.bytes[direction as usize] += bytes as u64;
    }

    pub(super) fn dropped(&mut self, reason: DropReason) {
        self.dropped[index(reason)] += 1;
    }

    pub(super) fn lost(&mut self, loss: Loss) {
        self.dropped[OTHER + 1 + loss as usize] += 1;
    }

    /// An answer left: a STUN response of our own making. Methods and codes are few, so the list stays short.
    pub(super) fn answered(&mut self, reply: &[u8]) {
        let Some((method, code)) = method_and_code(reply) else {
            return;
        };
        match self.answers.iter_mut().find(|entry| (entry.0, entry.1) == (method, code)) {
            Some(entry) => entry.2 += 1,
            None => self.answers.push((method, code, 1)),
        }
    }

    /// Copies everything that is not zero.
    pub(super) fn snapshot(&self) -> WorkerSnapshot {
        let dropped = LABELS.iter().copied().zip(self.dropped);
        WorkerSnapshot {
            packets: self.packets,
            bytes: self.bytes,
            dropped: dropped.filter(|(_, count)| *count != 0).collect(),
            answers: self.answers.clone(),
            crossed: self.crossed,
            hello_verify_requests: self.hello_verify_requests,
            ..WorkerSnapshot::default()
        }
    }
}

fn index(reason: DropReason) -> usize {
    match reason {
        DropReason::Malformed => 0,
        DropReason::NoAllocation => 1,
        DropReason::NoChannel => 2,
        DropReason::NoPermission => 3,
        DropReason::ForbiddenPeer => 4,
        DropReason::NobodyThere => 5,
        DropReason::FamilyMismatch => 6,
        DropReason::NoBackbone => 7,
        DropReason::Unexpected => 8,
        DropReason::TooLong => 9,
        DropReason::NotReady => 10,
        DropReason::PeerConnections => 11,
        DropReason::Bandwidth => 12,
        DropReason::IcmpRate => 13,
        DropReason::TooManyStrangers => 14,
        DropReason::Amplification => 15,
        DropReason::PacketRate => 16,
        _ => OTHER,
    }
}

/// Method and error code of an answer; code 0 is success.
fn method_and_code(reply: &[u8]) -> Option<(&'static str, u16)> {
    let message = Message::parse(reply).ok()?;
    let code = match message.class() {
        Class::Success => 0,
        Class::Error => message.attribute::<ErrorCode>().ok()??.code(),
        Class::Request | Class::Indication => return None,
    };
    let method = match message.method() {
        Method::Binding => "binding",
        Method::Allocate => "allocate",
        Method::Refresh => "refresh",
        Method::CreatePermission => "create_permission",
        Method::ChannelBind => "channel_bind",
        Method::Connect => "connect",
        Method::ConnectionBind => "connection_bind",
        Method::ConnectionAttempt | Method::Send | Method::Data | Method::Other(_) => "other",
    };
    Some((method, code))
}

#[cfg(test)]
mod tests {
    use turn_core::wire::{MessageWriter, TransactionId};

    use super::*;

    #[test]
    fn labels_name_what_they_count() {
        let mut counters = Counters::default();
        counters.dropped(DropReason::Malformed);
        counters.dropped(DropReason::TooLong);
        counters.lost(Loss::RingFull);
        counters.lost(Loss::RestoreAddress);
        counters.lost(Loss::RestoreAddress);
        assert_eq!(
            counters.snapshot().dropped,
            [("malformed", 1), ("too_long", 1), ("ring_full", 1), ("restore_address", 2)]
        );
    }

    #[test]
    fn answers_are_counted_by_method_and_code() {
        let answer = |class, method, code: Option<ErrorCode>| {
            let mut buffer = [0; 128];
            let mut writer = MessageWriter::new(&mut buffer, class, method, TransactionId([1; 12]));
            if let Some(code) = code {
                writer.attribute(&code);
            }
            let length = writer.finish().expect("room");
            buffer[..length].to_vec()
        };
        let mut counters = Counters::default();
        let unauthorized = ErrorCode::new(401).expect("a code");
        for reply in [
            answer(Class::Success, Method::Binding, None),
            answer(Class::Error, Method::Allocate, Some(unauthorized)),
            answer(Class::Error, Method::Allocate, Some(unauthorized)),
            answer(Class::Indication, Method::Data, None),
            b"no STUN".to_vec(),
        ] {
            counters.answered(&reply);
        }
        assert_eq!(counters.snapshot().answers, [("binding", 0, 1), ("allocate", 401, 2)]);
    }
}
