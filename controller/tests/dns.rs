//! The DNS server, asked by hickory's client over UDP and TCP.

mod site;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use controller::dns::{DnsSettings, Listeners};
use controller::fleet::NodeListener;
use futures_util::StreamExt as _;
use hickory_server::net::client::Client;
use hickory_server::net::runtime::TokioRuntimeProvider;
use hickory_server::net::tcp::TcpClientStream;
use hickory_server::net::udp::UdpClientStream;
use hickory_server::net::xfer::DnsHandle as _;
use hickory_server::proto::op::{
    DnsRequest, DnsRequestOptions, Edns, Message, MessageType, OpCode, Query, ResponseCode,
};
use hickory_server::proto::rr::rdata::opt::{ClientSubnet, EdnsCode, EdnsOption};
use hickory_server::proto::rr::{DNSClass, Name, RData, Record, RecordType};
use serde_json::Value;
use tokio::task::JoinSet;
use turn_core::Transport;

use self::site::{Node, Site, node};

const ZONE: &str = "turn.example.org.";

/// A server and a client of it over each transport.
struct Stage {
    address: SocketAddr,
    udp: Client<TokioRuntimeProvider>,
    tcp: Client<TokioRuntimeProvider>,
    tasks: JoinSet<()>,
}

impl Stage {
    async fn start(site: &Site, rate: u32) -> Result<Self> {
        let settings = DnsSettings {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            zone: ZONE.parse()?,
            name_servers: vec!["ns1.example.org.".parse()?, "ns2.example.org.".parse()?],
            ttl: 10,
            rate,
        };
        let listeners = Listeners::bind(&settings).await?;
        let address = *listeners.addresses().first().context("an address")?;
        let mut tasks = JoinSet::new();
        tasks.spawn(listeners.serve(settings, site.health.clone(), site.shutdown.clone()));

        let provider = TokioRuntimeProvider::new();
        let stream = UdpClientStream::builder(address, provider.clone()).build();
        let (udp, background) = Client::from_sender(stream);
        tasks.spawn(async move {
            let _ = background.await;
        });
        let patience = Some(Duration::from_secs(5));
        let (stream, handle) = TcpClientStream::new(address, None, patience, provider);
        let (tcp, background) = Client::new(stream.await?, handle);
        tasks.spawn(async move {
            let _ = background.await;
        });
        Ok(Self { address, udp, tcp, tasks })
    }

    /// The same answer by both transports.
    async fn ask(&self, name: &str, kind: RecordType, subnet: Option<(&str, u8)>) -> Result<Message> {
        let udp = ask(&self.udp, name, kind, subnet).await?;
        let tcp = ask(&self.tcp, name, kind, subnet).await?;
        ensure!(!udp.metadata.truncation, "{name} {kind}: too long for UDP");
        ensure!(udp.metadata.response_code == tcp.metadata.response_code, "{udp:?} {tcp:?}");
        ensure!(data(&udp.answers) == data(&tcp.answers), "{udp:?} {tcp:?}");
        Ok(udp)
    }
}

async fn ask(
    client: &Client<TokioRuntimeProvider>,
    name: &str,
    kind: RecordType,
    subnet: Option<(&str, u8)>,
) -> Result<Message> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(name.parse()?, kind));
    if let Some((address, prefix)) = subnet {
        let mut edns = Edns::new();
        edns.set_max_payload(1232);
        edns.options_mut().insert(EdnsOption::Subnet(ClientSubnet::new(address.parse()?, prefix, 0)));
        message.edns = Some(edns);
    }
    let mut answers = client.send(DnsRequest::new(message, DnsRequestOptions::default()));
    let answer = tokio::time::timeout(Duration::from_secs(10), answers.next()).await?.context("an answer")?;
    match answer {
        Ok(answer) => Ok(answer.into_message()),
        // The client takes these answers for errors; what they say is looked at all the same.
        Err(error) => bail!("{name} {kind}: {error}"),
    }
}

fn data(records: &[Record]) -> BTreeSet<String> {
    records.iter().map(|record| record.data.to_string()).collect()
}

fn fleet() -> [Node; 4] {
    let draining = node("eu-2", "eu", 2).with(|node| node.load.draining = true);
    let with_tls = node("us-1", "us", 3).with(|node| {
        let listener = |transport, address: &str| NodeListener {
            transport,
            address: address.parse().expect("literal"),
            ip_in_certificate: false,
        };
        node.record.listeners.push(listener(Transport::Tls, "198.51.100.3:5349"));
        node.record.listeners.push(listener(Transport::Tls, "198.51.100.3:443"));
        node.record.listeners.push(listener(Transport::Udp, "[2001:db8::3]:3478"));
    });
    [node("eu-1", "eu", 1), draining, with_tls, node("ap-1", "ap", 4)]
}

#[tokio::test(flavor = "multi_thread")]
async fn names_lead_to_the_healthy_relays_of_their_region() -> Result<()> {
    let site = Site::start(&[], &fleet()).await?;
    let stage = Stage::start(&site, 0).await?;
    let a = async |name: &str| Ok::<_, anyhow::Error>(data(&stage.ask(name, RecordType::A, None).await?.answers));
    let set = |list: &[&str]| list.iter().map(|it| (*it).to_owned()).collect::<BTreeSet<_>>();
    // Two relays, as HTTP gives: the nearest, and the next. eu-2 drains.
    assert_eq!(a(ZONE).await?, set(&["198.51.100.1", "198.51.100.3"]), "from the controller's region");
    assert_eq!(a("ap.turn.example.org.").await?, set(&["198.51.100.4", "198.51.100.3"]));
    assert_eq!(a("US.Turn.Example.ORG.").await?, set(&["198.51.100.3", "198.51.100.1"]), "case does not matter");
    assert_eq!(a("eu-2.nodes.turn.example.org.").await?, set(&["198.51.100.2"]), "a node by its name, as it is");
    let v6 = stage.ask("us-1.nodes.turn.example.org.", RecordType::AAAA, None).await?;
    assert_eq!(data(&v6.answers), set(&["2001:db8::3"]));
    assert!(v6.metadata.authoritative && v6.answers[0].ttl == 10, "{v6:?}");

    let naptr = stage.ask("us.turn.example.org.", RecordType::NAPTR, None).await?;
    let mut services: Vec<(u16, String, String)> = Vec::new();
    for record in &naptr.answers {
        let RData::NAPTR(naptr) = &record.data else { bail!("{record:?}") };
        services.push((naptr.preference, String::from_utf8(naptr.services.to_vec())?, naptr.replacement.to_string()));
    }
    services.sort();
    let expected = [
        (10, "RELAY:turn.udp", "_turn._udp.us.turn.example.org."),
        (20, "RELAY:turn.tcp", "_turn._tcp.us.turn.example.org."),
        (30, "RELAY:turn.tls", "_turns._tcp.us.turn.example.org."),
    ];
    assert_eq!(services, expected.map(|(preference, a, b)| (preference, a.to_owned(), b.to_owned())));
    // RFC 5928 goes on by SRV, and by the addresses that come along.
    for (name, expected) in [
        (
            "_turns._tcp.us.turn.example.org.",
            set(&["10 100 443 us-1.nodes.turn.example.org.", "10 100 5349 us-1.nodes.turn.example.org."]),
        ),
        (
            "_turn._udp.us.turn.example.org.",
            set(&["10 100 3478 us-1.nodes.turn.example.org.", "20 100 3478 eu-1.nodes.turn.example.org."]),
        ),
        ("_turns._udp.turn.example.org.", set(&[])),
    ] {
        let srv = stage.ask(name, RecordType::SRV, None).await?;
        assert_eq!(data(&srv.answers), expected, "{name}");
        let with_addresses = data(&srv.additionals).contains("198.51.100.3");
        assert_eq!(with_addresses, name.contains("us.turn"), "{srv:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_as_the_rfcs_want_it() -> Result<()> {
    let site = Site::start(&[], &fleet()).await?;
    let stage = Stage::start(&site, 0).await?;
    let soa = stage.ask(ZONE, RecordType::SOA, None).await?;
    assert_eq!(data(&soa.answers).len(), 1);
    let ns = stage.ask(ZONE, RecordType::NS, None).await?;
    assert_eq!(data(&ns.answers), ["ns1.example.org.", "ns2.example.org."].map(str::to_owned).into());
    let cases = [
        ("mars.turn.example.org.", RecordType::A, ResponseCode::NXDomain),
        ("eu-9.nodes.turn.example.org.", RecordType::A, ResponseCode::NXDomain),
        ("_sip._udp.turn.example.org.", RecordType::SRV, ResponseCode::NXDomain),
        ("_turn._udp.mars.turn.example.org.", RecordType::SRV, ResponseCode::NXDomain),
        ("nodes.turn.example.org.", RecordType::A, ResponseCode::NoError),
        ("_udp.turn.example.org.", RecordType::SRV, ResponseCode::NoError),
        ("turn.example.org.", RecordType::TXT, ResponseCode::NoError),
        ("eu-1.nodes.turn.example.org.", RecordType::AAAA, ResponseCode::NoError),
        ("example.org.", RecordType::A, ResponseCode::Refused),
        ("turn.example.com.", RecordType::A, ResponseCode::Refused),
    ];
    for (name, kind, expected) in cases {
        let answer = raw(stage.address, name, kind, DNSClass::IN).await?;
        assert_eq!(answer.metadata.response_code, expected, "{name} {kind}");
        assert!(answer.answers.is_empty(), "{name} {kind}: {answer:?}");
        let has_soa = answer.authorities.iter().any(|record| record.record_type() == RecordType::SOA);
        assert_eq!(has_soa, expected != ResponseCode::Refused, "how long nothing is true: {name} {kind}");
    }
    let chaos = raw(stage.address, ZONE, RecordType::TXT, DNSClass::CH).await?;
    assert_eq!(chaos.metadata.response_code, ResponseCode::Refused);
    Ok(())
}

/// A question by a socket: clients take some answers for errors.
async fn raw(server: SocketAddr, name: &str, kind: RecordType, class: DNSClass) -> Result<Message> {
    let mut message = Message::new(9, MessageType::Query, OpCode::Query);
    let mut query = Query::query(name.parse::<Name>()?, kind);
    query.set_query_class(class);
    message.add_query(query);
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await?;
    socket.send_to(&message.to_vec()?, server).await?;
    let mut bytes = [0; 4096];
    let len = tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut bytes)).await??;
    Ok(Message::from_vec(&bytes[..len])?)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_s_subnet_decides_and_http_says_the_same() -> Result<()> {
    let site = Site::start(&[], &fleet()).await?;
    let stage = Stage::start(&site, 0).await?;
    let clients = [("203.0.113.0", "us", "us-1"), ("198.18.7.0", "ap", "ap-1"), ("2001:db8:77::", "eu", "eu-1")];
    let replica = site.replica();
    for (client, region, _) in clients {
        let client: IpAddr = client.parse()?;
        replica.discovery.report(client, &[(region.to_owned(), 9.0)]);
    }
    for (client, _, nearest) in clients {
        let http = reqwest::get(site.url(&format!("/v1/ice-servers?limit=2&client={client}"))).await?;
        let http: Value = http.error_for_status()?.json().await?;
        assert_eq!(http["nodes"][0], nearest, "{client}");
        let prefix = if client.contains(':') { 48 } else { 24 };
        let dns = stage.ask("_turn._udp.turn.example.org.", RecordType::SRV, Some((client, prefix))).await?;
        let first = data(&dns.answers).into_iter().next().context("an answer")?;
        assert_eq!(first, format!("10 100 3478 {nearest}.nodes.turn.example.org."), "{client}");
        // RFC 7871: what was asked for comes back with how much of it mattered.
        let edns = dns.edns.context("EDNS")?;
        let Some(EdnsOption::Subnet(subnet)) = edns.option(EdnsCode::Subnet) else { bail!("no subnet: {edns:?}") };
        let scope = if client.contains(':') { 56 } else { 24 };
        assert_eq!((subnet.source_prefix(), subnet.scope_prefix()), (prefix, scope), "{client}");
    }
    // Who wants nothing told of itself gets what its resolver gets.
    let dns = stage.ask("_turn._udp.turn.example.org.", RecordType::SRV, Some(("0.0.0.0", 0))).await?;
    assert!(data(&dns.answers).contains("10 100 3478 eu-1.nodes.turn.example.org."), "{dns:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_without_a_store_answers_servfail_then_what_it_last_saw_and_drained_relays_leave() -> Result<()> {
    let mut site = Site::not_ready(&[]).await?;
    let stage = Stage::start(&site, 0).await?;
    let early = raw(stage.address, ZONE, RecordType::A, DNSClass::IN).await?;
    assert_eq!(early.metadata.response_code, ResponseCode::ServFail);
    for node in &fleet() {
        site.put(node).await?;
    }
    site.make_ready().await?;
    // Over one transport: two questions may be answered from before and behind a change.
    let a = async || {
        let answer = ask(&stage.udp, "eu.turn.example.org.", RecordType::A, None).await?;
        Ok::<_, anyhow::Error>(data(&answer.answers))
    };
    assert!(a().await?.contains("198.51.100.1"));
    site.put(&node("eu-1", "eu", 1).with(|node| node.load.suspect = true)).await?;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while a().await?.contains("198.51.100.1") {
        ensure!(tokio::time::Instant::now() < deadline, "a suspect relay is still named");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(a().await?, ["198.51.100.3", "198.51.100.4"].map(str::to_owned).into());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_questions_over_udp_are_sent_to_tcp_and_never_answered_at_length() -> Result<()> {
    let site = Site::start(&[], &fleet()).await?;
    let mut stage = Stage::start(&site, 5).await?;
    let (mut answered, mut truncated) = (0, 0);
    for _ in 0..40 {
        let answer = raw(stage.address, ZONE, RecordType::A, DNSClass::IN).await?;
        match (answer.metadata.truncation, answer.answers.len()) {
            (false, 2) => answered += 1,
            (true, 0) => truncated += 1,
            other => bail!("{other:?}: {answer:?}"),
        }
    }
    assert!((10..20).contains(&answered) && truncated >= 20, "{answered} answered, {truncated} truncated");
    let tcp = ask(&stage.tcp, ZONE, RecordType::A, None).await?;
    assert_eq!(tcp.answers.len(), 2, "TCP shows where it is");

    // Rubbish is no reason to end.
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await?;
    for rubbish in [&b""[..], &[0; 11], &[0xFF; 64], b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x3f"] {
        socket.send_to(rubbish, stage.address).await?;
        let mut stream = tokio::net::TcpStream::connect(stage.address).await?;
        let mut framed = u16::try_from(rubbish.len())?.to_be_bytes().to_vec();
        framed.extend(rubbish);
        tokio::io::AsyncWriteExt::write_all(&mut stream, &framed).await?;
    }
    assert_eq!(ask(&stage.tcp, ZONE, RecordType::A, None).await?.answers.len(), 2);
    site.shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(5), stage.tasks.join_next()).await?;
    Ok(())
}
