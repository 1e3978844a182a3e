//! One connection to one controller: mTLS, Hello, Welcome, and the two directions of the stream.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Streaming};
use tracing::Instrument as _;
use turn_core::MemberId;
use turnpike_proto::trace;
use turnpike_proto::v1::fleet_client::FleetClient;
use turnpike_proto::v1::relay_message::Body as Say;
use turnpike_proto::v1::{self, ControllerMessage, RelayMessage, controller_message::Body as Hear};

use crate::backbone::MemberList;
use crate::config::{self, Controllers};
use crate::dataplane::Lookup;

/// Version of `fleet.proto` this binary speaks.
const PROTOCOL: u32 = 2;
/// Versions it understands: its own, the one before and the one after.
const PROTOCOLS: std::ops::RangeInclusive<u32> = PROTOCOL - 1..=PROTOCOL + 1;
/// The name every controller's certificate carries.
const SERVER_NAME: &str = "controller.turnpike";
/// A controller that answers no HTTP/2 ping for [`PING_TIMEOUT`] after one was due is gone: 3 s in all.
const PING: Duration = Duration::from_secs(1);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// From the first packet to a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// How long an orderly end waits for its last words to be taken.
const GOODBYE: Duration = Duration::from_millis(500);
/// How long a controller may look for clients.
const LOCATE: Duration = Duration::from_millis(800);
/// Messages on their way into the stream.
const OUTBOUND: usize = 32;

/// Why one session is over, or never began.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("relay {owner:?} owns the relay address")]
    Superseded { owner: String, epoch: u64 },
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    #[error("the relay address is handed over to {to:?}")]
    HandedOver { to: String },
    #[error("asked again who owns the relay address")]
    Again,
    #[error("{0}")]
    Controller(String),
    #[error("another controller has taken over")]
    Moved,
    #[error("no connection within {:.1} s", .0.as_secs_f32())]
    Unreachable(Duration),
    #[error("no answer within {:.1} s", .0.as_secs_f32())]
    Silent(Duration),
    #[error("it broke the protocol: {0}")]
    Protocol(&'static str),
    #[error(
        "the controller speaks protocol {0}, this relay {least} to {most}; upgrade the older one",
        least = PROTOCOLS.start(),
        most = PROTOCOLS.end()
    )]
    Version(u32),
    #[error("the data plane is gone")]
    NoDataplane,
    #[error(transparent)]
    State(#[from] crate::state_directory::StateError),
}

/// The answer to Hello.
pub(super) enum Greeting {
    /// The relay owns its address.
    Welcome(Box<v1::Welcome>),
    /// Another one does; the session goes on until this one is welcome.
    Waiting(v1::Waiting),
}

impl Greeting {
    /// Of a relay that serves: another owner is the end of that.
    pub(super) fn welcome(self) -> Result<v1::Welcome, Lost> {
        match self {
            Self::Welcome(welcome) => Ok(*welcome),
            Self::Waiting(v1::Waiting { owner, epoch }) => Err(Lost::Superseded { owner, epoch }),
        }
    }
}

/// A session that was welcomed, or waits for it.
pub(super) struct Connection {
    say: mpsc::Sender<RelayMessage>,
    hear: Streaming<ControllerMessage>,
    client: FleetClient<Channel>,
}

impl Connection {
    /// From nothing to Welcome, or Waiting, for which a controller that can be reached has `patience`. Certificates are
    /// read anew each time, so that replaced ones come into use.
    pub(super) async fn open(
        endpoint: &str,
        controllers: &Controllers,
        hello: v1::Hello,
        patience: Duration,
    ) -> Result<(Self, Greeting), Lost> {
        let endpoint = endpoint_of(endpoint, controllers)?;
        let began = Instant::now();
        let channel = timeout(CONNECT, endpoint.connect()).await.map_err(|_| Lost::Unreachable(CONNECT))?;
        let channel = channel.map_err(|error| broken(&error))?;
        let left = patience.saturating_sub(began.elapsed());
        timeout(left, Self::greet(channel, hello)).await.map_err(|_| Lost::Silent(patience))?
    }

    async fn greet(channel: Channel, hello: v1::Hello) -> Result<(Self, Greeting), Lost> {
        let mut client = FleetClient::new(channel);
        let (say, said) = mpsc::channel(OUTBOUND);
        let first = client.session(ReceiverStream::new(said));
        send(&say, Say::Hello(hello))?;
        let mut hear = first.await.map_err(refused)?.into_inner();
        match hear.message().await.map_err(refused)?.and_then(|message| message.body) {
            Some(Hear::Welcome(welcome)) => Ok((Self { say, hear, client }, Greeting::Welcome(Box::new(welcome)))),
            Some(Hear::Waiting(owner)) => Ok((Self { say, hear, client }, Greeting::Waiting(owner))),
            Some(Hear::Superseded(v1::Superseded { owner, epoch })) => Err(Lost::Superseded { owner, epoch }),
            Some(_) => Err(Lost::Protocol("its first message is none of Welcome, Waiting and Superseded")),
            None => Err(Lost::Controller("it ended the session before it began".into())),
        }
    }

    /// Asks for the stored records of a relay address, sealed; in batches of the controller's choice.
    pub(super) fn restore(
        &self,
        request: v1::RestoreRequest,
    ) -> impl Future<Output = Result<Vec<Vec<u8>>, Lost>> + use<> {
        let mut client = self.client.clone();
        let span = tracing::debug_span!(target: trace::TARGET, parent: None, "restore", otel.kind = "client");
        let mut request = Request::new(request);
        if !span.is_disabled()
            && let Ok(traceparent) = trace::traceparent(&span).parse()
        {
            request.metadata_mut().insert(trace::TRACEPARENT, traceparent);
        }
        let restored = async move {
            let mut batches = client.restore(request).await.map_err(refused)?.into_inner();
            let mut records = Vec::new();
            while let Some(batch) = batches.message().await.map_err(refused)? {
                records.extend(batch.records);
            }
            Ok(records)
        };
        restored.instrument(span)
    }

    /// Asks which members have the allocations of clients. What is not answered in time is nobody's.
    pub(super) fn locate(
        &self,
        lookups: Vec<Lookup>,
        members: watch::Receiver<Arc<MemberList>>,
    ) -> impl Future<Output = Vec<(Lookup, Option<MemberId>)>> + use<> {
        let mut client = self.client.clone();
        async move {
            let clients = lookups.iter().map(|lookup| lookup.client.to_string()).collect();
            let answer = timeout(LOCATE, client.locate(v1::LocateRequest { clients })).await;
            let found = answer.ok().and_then(Result::ok).map(|answer| answer.into_inner().found).unwrap_or_default();
            let members = members.borrow().clone();
            let number = |node_id: &str| members.members.iter().find(|it| &*it.node_id == node_id).map(|it| it.id);
            let of = |lookup: &Lookup| {
                let found = found.iter().find(|found| found.client.parse() == Ok(lookup.client))?;
                number(&found.node_id)
            };
            lookups.into_iter().map(|lookup| (lookup, of(&lookup))).collect()
        }
    }

    /// The next message. May be dropped and called again.
    pub(super) async fn hear(&mut self) -> Result<Option<Hear>, Lost> {
        match self.hear.message().await.map_err(refused)? {
            Some(message) => Ok(message.body),
            None => Err(Lost::Controller("it ended the session".into())),
        }
    }

    /// How many messages the stream takes now.
    pub(super) fn room(&self) -> usize {
        self.say.capacity()
    }

    /// Says something; there must be room.
    pub(super) fn say(&self, body: Say) -> Result<(), Lost> {
        send(&self.say, body)
    }

    /// Says something that may be left out.
    pub(super) fn say_if_room(&self, body: Say) -> Result<(), Lost> {
        if self.room() > 1 { self.say(body) } else { Ok(()) }
    }

    /// Goodbye, then waits a little until the controller has taken everything.
    pub(super) async fn close(mut self) -> Result<(), Lost> {
        self.say(Say::Goodbye(v1::Goodbye { reason: "stopped".into() }))?;
        drop(self.say);
        let taken = async { while let Ok(Some(_)) = self.hear.message().await {} };
        if timeout(GOODBYE, taken).await.is_err() {
            tracing::debug!("the controller did not end the session after Goodbye");
        }
        Ok(())
    }
}

fn endpoint_of(endpoint: &str, controllers: &Controllers) -> Result<Endpoint, Lost> {
    let identity = controllers.read_identity()?;
    let tls = ClientTlsConfig::new()
        .domain_name(SERVER_NAME)
        .ca_certificate(Certificate::from_pem(identity.ca))
        .identity(Identity::from_pem(identity.certificate, identity.key));
    Ok(Endpoint::from_shared(endpoint.to_owned())
        .map_err(|error| broken(&error))?
        .tls_config(tls)
        .map_err(|error| broken(&error))?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// Refuses a controller that is too old or too new to be understood. One of protocol 1 does not say what it speaks.
pub(super) fn check_protocol(protocol: u32) -> Result<(), Lost> {
    if PROTOCOLS.contains(&protocol.max(1)) { Ok(()) } else { Err(Lost::Version(protocol)) }
}

/// What this relay says of itself; `boot_id` is drawn here.
pub(super) fn hello(settings: &config::Settings, epoch: u64) -> anyhow::Result<v1::Hello> {
    let mut boot = [0; 16];
    getrandom::fill(&mut boot)?;
    let listener = |(transport, address): (turn_core::Transport, SocketAddr)| {
        let transport = match transport {
            turn_core::Transport::Udp => v1::Transport::Udp,
            turn_core::Transport::Tcp => v1::Transport::Tcp,
            turn_core::Transport::Tls => v1::Transport::Tls,
            turn_core::Transport::Dtls => v1::Transport::Dtls,
        };
        let ip_in_certificate = matches!(transport, v1::Transport::Tls | v1::Transport::Dtls)
            && settings.streams.certificate_names(address.ip());
        v1::Listener { transport: transport.into(), address: address.to_string(), ip_in_certificate }
    };
    Ok(v1::Hello {
        node_id: settings.node_id.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: PROTOCOL,
        region: settings.region.clone(),
        zone: settings.zone.clone(),
        relay_address: settings.relay_address.to_string(),
        relay_ips: settings.relay_ips.iter().map(|ip| ip.advertised.to_string()).collect(),
        listeners: settings.advertised_listeners().into_iter().map(listener).collect(),
        claimed_epoch: epoch,
        boot_id: format!("{:032x}", u128::from_be_bytes(boot)),
        workers: settings.workers.into(),
        max_allocations: settings.max_allocations as u64,
        relay_port_low: (*settings.relay_ports.start()).into(),
        relay_port_high: (*settings.relay_ports.end()).into(),
        public_host: settings.streams.public_host.clone().unwrap_or_default(),
        standby: settings.address.standby,
        waits: settings.address.waits,
        backbone_addresses: settings.backbone.iter().flat_map(|b| &b.advertised).map(ToString::to_string).collect(),
        cluster_only: settings.cluster_only,
    })
}

fn send(say: &mpsc::Sender<RelayMessage>, body: Say) -> Result<(), Lost> {
    match say.try_send(RelayMessage { body: Some(body) }) {
        Ok(()) => Ok(()),
        Err(mpsc::error::TrySendError::Full(_)) => Err(Lost::Protocol("it does not read what it is told")),
        Err(mpsc::error::TrySendError::Closed(_)) => Err(Lost::Controller("the stream is closed".into())),
    }
}

fn refused(status: tonic::Status) -> Lost {
    let message = status.message().split_whitespace().collect::<Vec<_>>().join(" ");
    Lost::Controller(format!("{:?}: {message}", status.code()))
}

/// A transport error with its causes, on one line.
fn broken(error: &tonic::transport::Error) -> Lost {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    Lost::Controller(text.split_whitespace().collect::<Vec<_>>().join(" "))
}
