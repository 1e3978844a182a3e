//! DNS: the server that is authoritative for a zone of relays. Names lead to the relays that discovery by HTTP would name to
//! the same client, whose network is told by EDNS client subnet (RFC 7871), else taken to be the resolver's. Answers come
//! from the fleet as last seen, so they go on while the store is away.
//!
//! Nothing is kept per client. UDP answers to one network are bounded a second; beyond that they are empty and truncated, no
//! longer than the question, which sends resolvers to TCP and gives a forger nothing (P9). TCP connections are bounded in
//! number and time.

mod tcp;
mod zone;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hickory_server::net::runtime::Time;
use hickory_server::net::xfer::Protocol;
use hickory_server::proto::op::{Edns, Metadata, OpCode, ResponseCode};
use hickory_server::proto::rr::rdata::opt::{ClientSubnet, EdnsCode, EdnsOption};
use hickory_server::proto::rr::{DNSClass, Name, Record};
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo, Server};
use hickory_server::zone_handler::{MessageResponse, MessageResponseBuilder};
use tokio::net::{TcpListener, UdpSocket};
use tokio_util::sync::CancellationToken;

use self::zone::Zone;
use crate::api::{Limiter, Rates};
use crate::health::Health;
use crate::metrics;
use crate::steering::Query;

/// Longest UDP answer: what passes every network in one piece (DNS flag day 2020).
const UDP_PAYLOAD: u16 = 1232;

/// What the server is told.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DnsSettings {
    /// Where it listens, UDP and TCP.
    pub listen: Vec<SocketAddr>,
    /// The zone it is authoritative for.
    pub zone: Name,
    /// Names of the zone's servers, outside of it.
    pub name_servers: Vec<Name>,
    /// Life of an answer, seconds.
    pub ttl: u32,
    /// UDP answers a second to one address; 0 is no limit.
    pub rate: u32,
}

/// Bound sockets of the server.
pub struct Listeners {
    sockets: Vec<(UdpSocket, TcpListener)>,
}

/// An address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} (dns.listen): {error}")]
pub struct DnsBindError {
    address: SocketAddr,
    #[source]
    error: std::io::Error,
}

impl Listeners {
    /// Binds UDP and TCP of every address.
    ///
    /// # Errors
    /// One line with the address.
    pub async fn bind(settings: &DnsSettings) -> Result<Self, DnsBindError> {
        let mut sockets = Vec::new();
        for &address in &settings.listen {
            let bound = async {
                let tcp = TcpListener::bind(address).await?;
                // Port 0 is for tests: both the same.
                Ok((UdpSocket::bind(tcp.local_addr()?).await?, tcp))
            };
            sockets.push(bound.await.map_err(|error| DnsBindError { address, error })?);
        }
        Ok(Self { sockets })
    }

    /// Where they are bound.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(|(udp, _)| udp.local_addr().ok()).collect()
    }

    /// Answers until `shutdown`; with SERVFAIL until the controller is ready.
    pub async fn serve(self, settings: DnsSettings, health: Health, shutdown: CancellationToken) {
        let limiter = Limiter::new(Rates { address: settings.rate, key: 0 }, 0);
        let answers = Arc::new(Answers { zone: Zone::new(settings), health, limiter });
        let mut server = Server::new(Udp(answers.clone()));
        let mut streams = tokio::task::JoinSet::new();
        for (udp, tcp) in self.sockets {
            server.register_socket(udp);
            streams.spawn(tcp::serve(tcp, answers.clone(), shutdown.clone()));
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            ended = server.block_until_done() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "the DNS server ended");
                }
            }
        }
        streams.join_all().await;
    }
}

/// What answers come from.
struct Answers {
    zone: Zone,
    health: Health,
    limiter: Limiter,
}

/// An answer before it is encoded.
struct Answer {
    metadata: Metadata,
    edns: Option<Edns>,
    records: Records,
}

/// The sections of an answer.
#[derive(Default)]
struct Records {
    answers: Vec<Record>,
    authority: Vec<Record>,
    additional: Vec<Record>,
}

/// The UDP half: hickory's server reads and sends.
struct Udp(Arc<Answers>);

#[tonic::async_trait]
impl RequestHandler for Udp {
    async fn handle_request<R: ResponseHandler, T: Time>(&self, request: &Request, mut handle: R) -> ResponseInfo {
        let answer = self.0.answer(request);
        match handle.send_response(answer.response(request)).await {
            Ok(info) => info,
            Err(error) => {
                tracing::debug!(%error, "a DNS answer was not sent");
                answer.info()
            }
        }
    }
}

impl Answers {
    fn answer(&self, request: &Request) -> Answer {
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.recursion_available = false;
        let (code, records, network) = self.records(request, &mut metadata);
        metadata.response_code = code;
        metrics::dns(match code {
            _ if metadata.truncation => "limited",
            ResponseCode::NoError if records.answers.is_empty() => "empty",
            ResponseCode::NoError => "answered",
            ResponseCode::NXDomain => "no_such_name",
            _ => "refused",
        });
        Answer { edns: edns(request, network), metadata, records }
    }

    /// Code, records, and how many bits of the client's address they depend on.
    fn records(&self, request: &Request, metadata: &mut Metadata) -> (ResponseCode, Records, u8) {
        let nothing = |code| (code, Records::default(), 0);
        if request.metadata.op_code != OpCode::Query {
            return nothing(ResponseCode::NotImp);
        }
        let Ok(info) = request.request_info() else { return nothing(ResponseCode::FormErr) };
        let question = info.query.original();
        if question.query_class() != DNSClass::IN || !self.zone.holds(question.name()) {
            return nothing(ResponseCode::Refused);
        }
        if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return nothing(ResponseCode::BADVERS);
        }
        let resolver = request.src().ip().to_canonical();
        if request.protocol() == Protocol::Udp && self.limiter.answer(Some(resolver), None).is_err() {
            metadata.truncation = true;
            return nothing(ResponseCode::NoError);
        }
        metadata.authoritative = true;
        let Some(replica) = self.health.replica() else { return nothing(ResponseCode::ServFail) };
        // RFC 7871 §7.1.2: without bits of the address there is nothing to go by.
        let client = subnet(request).filter(|subnet| subnet.source_prefix() > 0).map_or(resolver, |it| it.addr());
        let mut depends_on = 0;
        let choose = |region: Option<&str>| {
            let query = Query { region: region.map(str::to_owned), client: Some(client), ..Query::default() };
            let choice = replica.discovery.relays(&query)?;
            if choice.origin.is_none() {
                depends_on = if client.is_ipv4() { 24 } else { 56 };
            }
            Some(choice)
        };
        let snapshot = replica.fleet.snapshot();
        let (code, records) = self.zone.answer(&snapshot, question.name(), question.query_type(), choose);
        (code, records, depends_on)
    }
}

impl Answer {
    fn response<'a>(
        &'a self,
        request: &'a Request,
    ) -> MessageResponse<
        'a,
        'a,
        impl Iterator<Item = &'a Record> + Send + 'a,
        impl Iterator<Item = &'a Record> + Send + 'a,
        impl Iterator<Item = &'a Record> + Send + 'a,
        impl Iterator<Item = &'a Record> + Send + 'a,
    > {
        let Records { answers, authority, additional } = &self.records;
        let builder = MessageResponseBuilder::new(&request.queries, self.edns.as_ref());
        builder.build(self.metadata, answers, authority, [], additional)
    }

    /// What hickory wants to know of an answer that could not be sent.
    fn info(&self) -> ResponseInfo {
        use hickory_server::proto::op::{Header, HeaderCounts};
        Header { metadata: self.metadata, counts: HeaderCounts::default() }.into()
    }
}

fn subnet(request: &Request) -> Option<ClientSubnet> {
    match request.edns.as_ref()?.option(EdnsCode::Subnet)? {
        EdnsOption::Subnet(subnet) => Some(*subnet),
        _ => None,
    }
}

/// EDNS as the question has it; the subnet comes back with how many bits of it mattered (RFC 7871 §7.2.1).
fn edns(request: &Request, depends_on: u8) -> Option<Edns> {
    let asked = request.edns.as_ref()?;
    let mut edns = Edns::new();
    edns.set_version(0);
    edns.set_max_payload(asked.max_payload().clamp(512, UDP_PAYLOAD));
    if let Some(subnet) = subnet(request) {
        let scope = if subnet.source_prefix() == 0 { 0 } else { depends_on };
        let answer = ClientSubnet::new(subnet.addr(), subnet.source_prefix(), scope);
        edns.options_mut().insert(EdnsOption::Subnet(answer));
    }
    Some(edns)
}

/// The other end of a TCP connection and whether it is fit to be answered.
fn is_sane(peer: IpAddr) -> bool {
    !peer.is_unspecified() && !peer.is_multicast()
}
