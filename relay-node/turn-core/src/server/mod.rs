//! The TURN server: `Server`, `Input`, `Verdict`, `Output`; the whole public API on one screen.
//!
//! | file | what it does |
//! |---|---|
//! | `auth`, `directory`, `known` | RFC 8489 §9.2.4: who is this |
//! | `challenge`, `strangers` | answers to whoever is not known: short, and only so many |
//! | `redirect`, `vouchers` | new clients that are sent elsewhere (RFC 8489 §10) |
//! | `reply` | requests and their answers |
//! | `binding`, `allocate`, `refresh`, `permission`, `channel`, `indication` | one method each |
//! | `discovery` | Binding where there is a second address (RFC 5780) |
//! | `relay`, `icmp` | packets between client and peers, and errors of the network about them |
//! | `tcp` | TCP allocations (RFC 6062): Connect, ConnectionBind, ConnectionAttempt |
//! | `lifecycle` | records, restore, ends, new settings |
//! | `mobility` | allocations that go on from another five-tuple |
//! | `relays` | one relayed address, or one of each family |
//! | `table`, `index`, `timer` | the allocations and their indexes |

mod allocate;
mod auth;
mod binding;
mod challenge;
mod channel;
mod directory;
mod discovery;
mod icmp;
mod indication;
mod known;
#[cfg(test)]
mod lab;
mod lifecycle;
mod mobility;
mod permission;
mod redirect;
mod refresh;
mod relay;
mod relays;
mod reply;
mod strangers;
mod table;
mod tcp;
mod timer;
mod vouchers;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha12Rng;
use rand_core::{Rng, SeedableRng};

use self::auth::User;
use self::directory::Directory;
pub use self::discovery::{DiscoveryPlace, NatDiscovery};
use self::known::KnownKeys;
pub use self::redirect::Redirected;
use self::redirect::Sources;
use self::reply::{REPLY, Request};
use self::strangers::Strangers;
use self::table::Table;
use self::tcp::control_of;
pub use self::vouchers::Vouchers;
use crate::meter::Meters;
use crate::nonce::NonceKeys;
use crate::ticket::Ticket;
use crate::wire::attribute::ReservationToken;
use crate::wire::{self, Class, ErrorCode, Kind, Message, Method};
use crate::{
    AccountId, AllocationId, Change, ConnectionId, Family, FiveTuple, MemberId, Path, PeerAddr, PeerConnectionId,
    PeerTransport, Record, RelayedAddr, Settings, WorkerId,
};

/// Both clocks, read by the caller.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For deadlines.
    pub mono: Instant,
    /// Unix milliseconds, for credentials, nonces and records.
    pub wall: u64,
}

/// IP header fields that relaying carries over (RFC 8656 §14).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct IpMeta {
    /// DSCP (upper six bits) and ECN (lower two).
    pub dscp_ecn: u8,
    /// TTL or hop limit as it arrived, or to be set; 0 where it is not known, or the system's own is to be used.
    pub ttl: u8,
    /// DF: the packet must not be fragmented on its way (RFC 8656 §14, DONT-FRAGMENT).
    pub dont_fragment: bool,
}

/// What happened. Nothing else can wake the machine; both clocks come from the caller.
#[derive(Debug)]
pub enum Input<'a> {
    /// A datagram, or one whole frame of a stream (RFC 8656 §12.5), from a client.
    FromClient {
        /// Who sent it and where to.
        from: FiveTuple,
        /// The way an answer leaves.
        path: Path,
        /// The bytes.
        packet: &'a [u8],
        /// IP header fields.
        ip: IpMeta,
    },
    /// A datagram that arrived at a relayed address.
    FromPeer {
        /// Where it arrived.
        relayed: RelayedAddr,
        /// Its source.
        from: PeerAddr,
        /// The application data.
        packet: &'a [u8],
        /// IP header fields.
        ip: IpMeta,
    },
    /// A stream or a DTLS session ended: its allocation ends with it (RFC 8656 §5).
    Closed(ConnectionId),
    /// An ICMP error came for what this relayed address sent to the peer (RFC 8656 §11.5).
    Icmp {
        /// The relayed address that sent.
        relayed: RelayedAddr,
        /// The peer it sent to.
        peer: PeerAddr,
        /// ICMP type.
        kind: u8,
        /// ICMP code.
        code: u8,
        /// MTU of the next hop where it said one, else 0.
        mtu: u32,
    },
    /// Something happened to a connection between a TCP allocation and a peer (RFC 6062 §5).
    PeerConnection {
        /// The relayed address it is of.
        relayed: RelayedAddr,
        /// Its name.
        connection: PeerConnectionId,
        /// What happened.
        event: PeerEvent,
    },
    /// From journal or store, newest (epoch, sequence) already chosen; its addresses are bound.
    ///
    /// It is served at once, without a new [`Output::Record`]. A record that has expired, or whose stream, session or five-tuple
    /// is gone, ends: [`Change::End`] and [`Output::Release`] follow. One no newer than what is held changes nothing.
    Restore {
        /// What to bring back.
        record: Box<Record>,
        /// The way to its client in this process.
        path: Path,
    },
    /// Key rings, policy, limits, drain.
    Configure(Arc<Settings>),
    /// Records are written under this epoch from now on.
    Own {
        /// The new epoch.
        epoch: u64,
    },
    /// An operator ends an allocation.
    Revoke(AllocationId),
    /// A kernel fast path carried packets for this relayed address: its bindings are in use.
    KernelActivity(RelayedAddr),
    /// The instant of [`Server::poll_timeout`] has come.
    Timeout,
}

/// What happened to a peer data connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PeerEvent {
    /// A peer connected to the relayed address, under a name that is new (RFC 6062 §5.3).
    /// [`Output::Pend`] or [`Output::ClosePeer`] follows.
    Arrived(PeerAddr),
    /// What [`Host::connect`] had begun is there (RFC 6062 §5.2).
    Connected,
    /// What [`Host::connect`] had begun came to nothing; the host has forgotten it.
    Failed,
    /// A ConnectionBind, on whichever worker, has claimed it (RFC 6062 §5.4).
    Bound,
    /// It, or the client data connection bound to it, has closed (RFC 6062 §5.5); the host has forgotten it.
    Closed,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Out {
    /// To a client of this relay.
    Client {
        /// Whom, and from which server address.
        to: FiveTuple,
        /// By which socket.
        path: Path,
    },
    /// To a peer on the internet, from a relayed address.
    Peer {
        /// The socket to send from.
        via: RelayedAddr,
        /// The peer.
        to: PeerAddr,
    },
    /// To another allocation of this node, which this worker (perhaps the same) owns.
    Worker {
        /// Who owns `to`.
        worker: WorkerId,
        /// The sender's relayed address; its advertised address is the source the other sees.
        via: RelayedAddr,
        /// The relayed address of the other allocation.
        to: PeerAddr,
    },
    /// To a relayed address of another member, by the backbone.
    Member {
        /// Which member.
        member: MemberId,
        /// The sender's relayed address.
        via: RelayedAddr,
        /// The relayed address there.
        to: PeerAddr,
    },
}

/// At most 48 bytes that stand before a payload: a ChannelData header, or a Data indication up to its data.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; Head::MAX],
    len: u8,
}

impl Head {
    /// Header 20, XOR-PEER-ADDRESS of IPv6 24, DATA's own header 4.
    pub const MAX: usize = 48;
    /// Nothing.
    pub const EMPTY: Self = Self { bytes: [0; Self::MAX], len: 0 };

    /// These bytes, if they are not too many.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        let mut head = Self::EMPTY;
        head.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        // At most MAX.
        head.len = bytes.len() as u8;
        Some(head)
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// What to do with the packet just handed in. Nothing is copied or written in place: the caller gathers.
#[derive(Debug)]
pub enum Verdict {
    /// Send `head`, then `packet[payload]`, then `padding` zero bytes.
    Send {
        /// Where to.
        out: Out,
        /// What stands before the payload.
        head: Head,
        /// The payload, a range of the packet handed in.
        payload: Range<usize>,
        /// Zero bytes behind it, 0..=3 (RFC 8489 §14, RFC 8656 §12.5).
        padding: u8,
        /// IP header fields to set.
        ip: IpMeta,
        /// Whose traffic it is, in the direction of `out`.
        account: AccountId,
    },
    /// Send [`Server::reply`] to the client; write the drained records to the journal first.
    Reply {
        /// Always [`Out::Client`].
        out: Out,
    },
    /// The allocation that the request is about belongs to this worker: hand the packet to its server, as it is.
    Elsewhere(WorkerId),
    /// Nothing to send.
    Done,
    /// Nothing to send, and the packet is counted under this reason.
    Drop(DropReason),
}

/// Slow-path effects, mirrored by whoever cares: sockets, journal, reports.
#[derive(Debug)]
pub enum Output {
    /// The allocation that held this address is gone: close the socket, free the port and the user's share.
    Release {
        /// What [`Host::bind`] had returned.
        relayed: RelayedAddr,
        /// Whose quota it was counted under, see [`BindRequest::quota_key`].
        quota_key: Box<[u8]>,
    },
    /// Peers at this IP may send to this relayed address until then (RFC 8656 §9), whatever was said before.
    /// Who filters what arrives may pass more than is permitted, never less: the server checks every packet itself.
    Permit {
        /// Where they may send to.
        relayed: RelayedAddr,
        /// Their IP.
        peer: IpAddr,
        /// [`Output::Forbid`] may come sooner, or later.
        until: Instant,
    },
    /// They may not any more. Each [`Output::Permit`] is taken back, before [`Output::Release`] at the latest.
    Forbid {
        /// As in [`Output::Permit`].
        relayed: RelayedAddr,
        /// As in [`Output::Permit`].
        peer: IpAddr,
    },
    /// For journal and store.
    Record(Change),
    /// The connection's allocation was revoked or broken: close it.
    Close(ConnectionId),
    /// This server has the allocation of a ticket from now on, or has it no more: for [`Host::ticket_owner`].
    Ticket {
        /// The ticket.
        ticket: Ticket,
        /// Whether it has it.
        held: bool,
    },
    /// Packets of a five-tuple are for this server from now on, whatever its address hashes to; or no more.
    Serve {
        /// The client's.
        five_tuple: FiveTuple,
        /// The way to it.
        path: Path,
        /// Whether they are.
        served: bool,
    },
    /// This peer data connection waits for a ConnectionBind of this user from now on; what the peer sends meanwhile is
    /// kept (RFC 6062 §5.2, §5.3).
    Pend {
        /// Its name.
        connection: PeerConnectionId,
        /// Who may claim it with [`Host::claim`].
        username: Box<[u8]>,
        /// Where the control connection comes from, for [`Host::control_of`].
        client: SocketAddr,
        /// What its bytes are to be charged to, each direction apart, where [`Server::limits`] has a rate for it.
        meters: Meters,
        /// Whose traffic it is.
        account: AccountId,
    },
    /// Once the answer has left, `connection` carries no TURN any more: what comes on it, beginning behind the request,
    /// goes to the peer as it is and back (RFC 6062 §5.4). `peer` was claimed by [`Host::claim`].
    Join {
        /// The client data connection.
        connection: ConnectionId,
        /// The peer data connection.
        peer: PeerConnectionId,
    },
    /// This peer data connection ends, whatever it is at, and with it the client data connection that was bound to it
    /// (RFC 6062 §5.5). One that is not known any more has ended already.
    ClosePeer(PeerConnectionId),
}

/// What a server needs from the process around it. `bind` is the slow path, `route` runs per packet.
pub trait Host {
    /// Binds a relayed address and counts it for its user. Success is never answered for a port not held.
    ///
    /// # Errors
    /// See [`BindError`]; nothing is held then.
    fn bind(&mut self, request: BindRequest<'_>) -> Result<Bound, BindError>;

    /// Begins a connection from the relayed address of a TCP allocation to a peer (RFC 6062 §5.2), under a name that is
    /// new. [`PeerEvent::Connected`] or [`PeerEvent::Failed`] follows, unless [`Output::ClosePeer`] comes first.
    ///
    /// # Errors
    /// See [`ConnectError`]; nothing was begun then.
    fn connect(&mut self, relayed: RelayedAddr, to: PeerAddr) -> Result<PeerConnectionId, ConnectError> {
        let _ = (relayed, to);
        Err(ConnectError::Failed)
    }

    /// Takes a pending connection for a client data connection (RFC 6062 §5.4). [`Output::Join`] follows;
    /// [`PeerEvent::Bound`] goes to the server that has the allocation.
    ///
    /// # Errors
    /// See [`ClaimError`]; nothing was taken then.
    fn claim(&mut self, connection: PeerConnectionId, username: &[u8]) -> Result<(), ClaimError> {
        let _ = (connection, username);
        Err(ClaimError::Unknown)
    }

    /// What an allocation of this user shares its bandwidth with. Asked once per allocation, where a limit is set.
    fn meters(&mut self, quota_key: &[u8]) -> Meters {
        let _ = quota_key;
        Meters::default()
    }

    /// Where what an allocation sends is to be counted; one that was `restored` may have been counted before. Asked once
    /// it is there, and again whenever it is restored.
    fn account(&mut self, id: AllocationId, username: &[u8], restored: bool) -> AccountId {
        let _ = (id, username, restored);
        AccountId::NONE
    }

    /// The worker whose server has the allocation of a ticket (RFC 8016). Never blocks, never allocates.
    fn ticket_owner(&self, ticket: &Ticket) -> Option<WorkerId> {
        let _ = ticket;
        None
    }

    /// Where the control connection of a pending connection comes from, as [`Output::Pend`] said. Its nonce is good for
    /// the ConnectionBind too: RFC 6062 §4.3 has clients use the same credentials on both.
    fn control_of(&self, connection: PeerConnectionId) -> Option<SocketAddr> {
        let _ = connection;
        None
    }

    /// Whether an address belongs to this node, to another member or to the internet. Never blocks, never allocates.
    fn route(&self, to: PeerAddr) -> Route;
}

/// A wanted relayed address.
#[derive(Clone, Copy, Debug)]
pub struct BindRequest<'a> {
    /// Wanted family.
    pub family: Family,
    /// Wanted protocol. A TCP relayed address accepts connections once it is bound (RFC 6062 §5.1).
    pub transport: PeerTransport,
    /// Who is counted: the part of an ephemeral user name after its colon, else the whole name.
    pub quota_key: &'a [u8],
    /// Wanted port.
    pub port: PortRequest,
}

/// Which port (RFC 8656 §7.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PortRequest {
    /// Any.
    Any,
    /// EVEN-PORT with the R bit 0.
    Even,
    /// EVEN-PORT with the R bit 1: the next-higher port is held too, for whoever brings its token.
    EvenAndNext,
    /// RESERVATION-TOKEN: the port held under it, of whatever family.
    Reserved(ReservationToken),
}

/// How long a reserved port is held for whoever brings its token: RFC 8656 §7.2 wants 30 seconds at least.
pub const RESERVED_FOR: Duration = Duration::from_secs(40);

/// What [`Host::bind`] holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bound {
    /// The relayed address.
    pub relayed: RelayedAddr,
    /// Of the next-higher port, for [`PortRequest::EvenAndNext`]. Held for [`RESERVED_FOR`].
    pub reservation: Option<ReservationToken>,
}

/// Why no relayed address was bound.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BindError {
    /// 440.
    #[error("this relay has no address of that family")]
    FamilyUnsupported,
    /// 486.
    #[error("the user holds as many allocations as allowed")]
    QuotaReached,
    /// 508.
    #[error("no such port is left, or the reservation has ended")]
    NoPort,
}

/// Why no connection to a peer was begun.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ConnectError {
    /// 403: an address of this cluster that is no relayed one.
    #[error("the peer is an address of this cluster that relays nothing")]
    Forbidden,
    /// 447.
    #[error("the system refuses the connection")]
    Failed,
    /// 508.
    #[error("this relay has as many connections to peers as allowed")]
    NoRoom,
}

/// Why a pending connection was not claimed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ClaimError {
    /// 400: no pending connection has the name, or it is bound already.
    #[error("no such connection is pending")]
    Unknown,
    /// 441: it is pending for somebody else.
    #[error("the connection is another user's")]
    OtherUser,
}

/// Who owns a peer's transport address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Route {
    /// Not ours: by the socket of the relayed address.
    Internet,
    /// A relayed address of this node, owned by this worker.
    Worker(WorkerId),
    /// A relayed address of another member.
    Member(MemberId),
    /// An IP of ours, but no relayed address: never reachable (abuse.md A).
    Nobody,
}

/// Why a packet came to nothing. A bounded metric label.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum DropReason {
    /// Neither STUN nor ChannelData, or broken.
    Malformed,
    /// An indication or ChannelData without an allocation (RFC 8656 §11, §12).
    NoAllocation,
    /// ChannelData on a channel that is not bound (RFC 8656 §12.6).
    NoChannel,
    /// No permission for the peer (RFC 8656 §9).
    NoPermission,
    /// The address policy forbids the peer.
    ForbiddenPeer,
    /// An own IP, but no relayed address there.
    NobodyThere,
    /// The allocation's peer family differs (RFC 8656 §10, §11).
    FamilyMismatch,
    /// The backbone does not carry it.
    NoBackbone,
    /// A response or an unknown method: silence. Also an indication with an attribute that is not understood.
    Unexpected,
    /// A request that nobody can be authenticated for yet (promise P5).
    NotReady,
    /// Longer than the next hop can carry.
    TooLong,
    /// The bandwidth of the allocation, its user or the node is used up.
    Bandwidth,
    /// The packets a second of the allocation or its user are used up.
    PacketRate,
    /// More ICMP errors than an allocation is told.
    IcmpRate,
    /// The allocation has as many connections to peers as allowed (RFC 6062).
    PeerConnections,
    /// Unauthenticated, and its source prefix has had its share of answers (abuse.md D).
    TooManyStrangers,
    /// No answer to this datagram would be short enough (abuse.md D).
    Amplification,
}

/// The TURN server of one worker: owns the allocations whose clients hash to it.
pub struct Server {
    worker: WorkerId,
    relay_address: IpAddr,
    epoch: u64,
    settings: Arc<Settings>,
    rng: ChaCha12Rng,
    table: Table,
    directory: Directory,
    known: KnownKeys,
    nonce_keys: NonceKeys,
    strangers: Strangers,
    sources: Sources,
    vouchers: Arc<Vouchers>,
    redirected: Redirected,
    outputs: VecDeque<Output>,
    reply: Box<[u8; REPLY]>,
    reply_len: usize,
    nat_discovery: Option<Box<NatDiscovery>>,
}

impl Server {
    /// A server without allocations. `seed` feeds allocation ids, indication transaction ids and the secrets of the hash
    /// tables only; ports come from the [`Host`].
    ///
    /// With settings that cannot authenticate anybody (no realm, no nonce keys, or neither REST secrets nor static
    /// users) it answers Binding, relays what is restored, and is silent to all other requests (promise P5).
    pub fn new(worker: WorkerId, relay_address: IpAddr, epoch: u64, settings: Arc<Settings>, seed: [u8; 32]) -> Self {
        let mut rng = ChaCha12Rng::from_seed(seed);
        let mut secret = || [rng.next_u64(), rng.next_u64()];
        let (table, strangers) = (Table::new(secret()), Strangers::new(secret()));
        let known = KnownKeys::new(secret());
        let (sources, vouchers) = (Sources::new(secret()), Arc::new(Vouchers::new(secret())));
        Self {
            worker,
            relay_address,
            epoch,
            directory: Directory::new(&settings),
            known,
            nonce_keys: NonceKeys::new(&settings.nonce_keys),
            settings,
            rng,
            table,
            strangers,
            sources,
            vouchers,
            redirected: Redirected::default(),
            outputs: VecDeque::new(),
            reply: Box::new([0; REPLY]),
            reply_len: 0,
            nat_discovery: None,
        }
    }

    /// Shares what the servers of a node have to know of one another's redirects.
    pub fn share_vouchers(&mut self, vouchers: Arc<Vouchers>) {
        self.vouchers = vouchers;
    }

    /// The worker it belongs to.
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// The one way in.
    pub fn handle_input(&mut self, now: Now, input: Input<'_>, host: &mut impl Host) -> Verdict {
        match input {
            Input::FromClient { from, path, packet, ip } => return self.on_client(now, from, path, packet, ip, host),
            Input::FromPeer { relayed, from, packet, ip } => return self.on_peer(now, &relayed, from, packet, ip),
            Input::Closed(connection) => self.closed(now, connection),
            Input::Restore { record, path } => self.restore(now, *record, path, host),
            Input::Configure(settings) => self.configure(now, settings),
            Input::Own { epoch } => self.epoch = epoch,
            Input::Revoke(id) => self.revoke(id),
            Input::PeerConnection { relayed, connection, event } => {
                return self.on_peer_connection(now, &relayed, connection, event);
            }
            Input::Timeout => {
                self.expire(now);
                return self.expire_peer_connections(now);
            }
            Input::Icmp { relayed, peer, kind, code, mtu } => {
                return self.on_icmp(now, &relayed, peer, (kind, code), mtu);
            }
            // TURN has no traffic timer: only requests refresh (RFC 8656 §6, §11.2, §12.6).
            Input::KernelActivity(_) => {}
        }
        Verdict::Done
    }

    /// RFC 8656 §12: what kind of packet is it.
    fn on_client(
        &mut self,
        now: Now,
        from: FiveTuple,
        path: Path,
        packet: &[u8],
        ip: IpMeta,
        host: &mut impl Host,
    ) -> Verdict {
        match wire::kind(packet) {
            Kind::ChannelData => self.on_channel_data(now, &from, packet, ip, host),
            Kind::Stun => {
                let Ok(message) = Message::parse(packet) else {
                    return Verdict::Drop(DropReason::Malformed);
                };
                match (message.class(), message.method()) {
                    (Class::Indication, Method::Send) => self.on_send(now, &from, &message, ip, host),
                    // RFC 8489 §6.3.2: it has done its work by coming.
                    (Class::Indication, Method::Binding) => Verdict::Done,
                    (Class::Request, _) => self.on_request(Request { now, from, path, message, control: None }, host),
                    _ => Verdict::Drop(DropReason::Unexpected),
                }
            }
            Kind::Dtls | Kind::Other => Verdict::Drop(DropReason::Malformed),
        }
    }

    /// RFC 8489 §6.3.1 and §9.2.4, then the method.
    fn on_request(&mut self, mut request: Request<'_>, host: &mut impl Host) -> Verdict {
        match request.message.method() {
            Method::Binding => return self.binding(&request),
            Method::Allocate | Method::Refresh | Method::CreatePermission | Method::ChannelBind => {}
            Method::Connect | Method::ConnectionBind if self.settings.features.tcp_allocations => {}
            Method::Connect
            | Method::ConnectionBind
            | Method::ConnectionAttempt
            | Method::Send
            | Method::Data
            | Method::Other(_) => return Verdict::Drop(DropReason::Unexpected),
        }
        if !self.can_authenticate() {
            return Verdict::Drop(DropReason::NotReady);
        }
        self.expire(request.now);
        self.supersede_connection(request.now, &request.from, request.path);
        if let Some(worker) = self.elsewhere(&request, host) {
            return Verdict::Elsewhere(worker);
        }
        if self.settings.restoring && request.message.method() != Method::Allocate && self.meant(&request).is_none() {
            return Verdict::Drop(DropReason::NotReady);
        }
        if self.is_one_too_many(&request) {
            return Verdict::Drop(DropReason::TooManyStrangers);
        }
        if let Some(verdict) = self.redirect(&request) {
            return verdict;
        }
        if request.message.method() == Method::ConnectionBind {
            request.control = control_of(&request, host);
        }
        let identity = match self.authenticate(&request) {
            Ok(identity) => identity,
            Err(refusal) => return self.refuse(&request, refusal),
        };
        let user = identity.user();
        if let Some(refused) = self.refuse_unknown(&request, Some(&user.key)) {
            return refused;
        }
        match self.serve(&request, &user, host) {
            Ok(verdict) => verdict,
            Err(code) => self.error(&request, code, Some(&user.key), |_| {}),
        }
    }

    fn serve(&mut self, request: &Request<'_>, user: &User<'_>, host: &mut impl Host) -> Result<Verdict, ErrorCode> {
        match request.message.method() {
            Method::Allocate => self.allocate(request, user, host),
            Method::Refresh => self.refresh(request, user),
            Method::CreatePermission => self.create_permission(request, user),
            Method::ChannelBind => self.channel_bind(request, user, host),
            Method::Connect => self.connect(request, user, host),
            Method::ConnectionBind => self.connection_bind(request, user, host),
            Method::Binding | Method::ConnectionAttempt | Method::Send | Method::Data | Method::Other(_) => {
                Ok(Verdict::Drop(DropReason::Unexpected))
            }
        }
    }

    /// The answer of the last [`Verdict::Reply`]; valid until the next input.
    pub fn reply(&self) -> &[u8] {
        &self.reply[..self.reply_len]
    }

    /// Effects, oldest first.
    #[inline]
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The bounds that are kept.
    pub fn limits(&self) -> &crate::Limits {
        &self.settings.limits
    }

    /// When to hand in [`Input::Timeout`]; never a scan.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.table.next_deadline()
    }

    /// Whether a five-tuple has an allocation here.
    pub fn serves(&self, now: Now, five_tuple: &FiveTuple) -> bool {
        self.live(now, five_tuple).is_some()
    }

    /// Allocations held.
    pub fn allocations(&self) -> usize {
        self.table.len()
    }

    /// Allocations held, by the transport of their clients: UDP, TCP, TLS, DTLS.
    pub fn allocations_by_transport(&self) -> [usize; 4] {
        self.table.by_transport()
    }

    /// Clients sent elsewhere since the beginning, by why.
    pub fn redirected(&self) -> Redirected {
        self.redirected
    }

    /// The record of every live allocation under the present epoch, for a resync or a compaction.
    pub fn records(&self, now: Now) -> impl Iterator<Item = Record> + '_ {
        self.table
            .iter()
            .filter(move |allocation| allocation.is_live(now.mono))
            .map(move |allocation| self.record_of(allocation, now))
    }
}
