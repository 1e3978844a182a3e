//! Two relays with a backbone between them, in one process: real data planes, real QUIC.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use relay_node::backbone::{self, Backbone, Identity, Member, MemberList, Usability};
use relay_node::dataplane::{ChangeReceiver, Dataplane, DataplaneConfig, Lookup, MemberRoute};
use tokio::sync::{mpsc, watch};
use turn_core::{MemberId, Policy, Settings, Transport};

use crate::client::{TurnClient, config, dropped, eventually, settings};

const WORKERS: u16 = 2;

/// A relay with its end of the backbone.
struct Relay {
    number: u16,
    ip: IpAddr,
    dataplane: Arc<Dataplane>,
    backbone: Option<Backbone>,
    members: watch::Sender<Arc<MemberList>>,
    lookups: Option<mpsc::Receiver<Lookup>>,
    ports: std::ops::RangeInclusive<u16>,
    cluster_only: bool,
    _directory: tempfile::TempDir,
    _changes: ChangeReceiver,
}

fn relay(number: u16, ip: &str, identity: &Identity, public: bool) -> Result<Relay> {
    let directory = tempfile::tempdir()?;
    let config = DataplaneConfig { public_ports: public, ..config(ip, WORKERS, directory.path()) };
    let policy = Policy { allow_loopback: public, ..Policy::default() };
    let settings = Arc::new(Settings { policy, ..(*settings()).clone() });
    let (dataplane, changes) = Dataplane::start(config.clone(), settings, Vec::new())?;
    let (dataplane, ip) = (Arc::new(dataplane), ip.parse()?);
    let links = backbone::Settings {
        node_id: node(number),
        listen: vec![SocketAddr::new(ip, 0)],
        relay_ips: vec![ip],
        private_networks: Vec::new(),
        capacity: None,
        plain_udp: public,
    };
    let (members, list) = watch::channel(Arc::default());
    let (backbone, outboxes) = Backbone::start(links, identity, list, WORKERS.into(), dataplane.delivery())?;
    let (ask, lookups) = mpsc::channel(64);
    dataplane.join_backbone(outboxes, &backbone.usabilities(), &ask);
    Ok(Relay {
        number,
        ip,
        dataplane,
        backbone: Some(backbone),
        members,
        lookups: Some(lookups),
        ports: config.relay_ports,
        cluster_only: !public,
        _directory: directory,
        _changes: changes,
    })
}

fn node(number: u16) -> String {
    format!("relay-{number}")
}

impl Relay {
    /// Tells it of another.
    fn meet(&self, other: &Self) -> Result<()> {
        let (id, relay_ips) = (MemberId(other.number), vec![other.ip]);
        let address = other.backbone.as_ref().context("it has a backbone")?.local_addresses()[0];
        let route = MemberRoute {
            id,
            relay_ips: relay_ips.clone(),
            relay_ports: other.ports.clone(),
            cluster_only: other.cluster_only,
        };
        self.dataplane.set_members(&[route]);
        let member = Member {
            id,
            node_id: node(other.number).into(),
            addresses: vec![address],
            relay_ips,
            relay_ports: other.ports.clone(),
        };
        self.members.send_replace(Arc::new(MemberList { members: vec![member], revoked_serials: Vec::new() }));
        let policy = Policy {
            members: vec![self.ip, other.ip],
            allow_loopback: !self.cluster_only,
            members_only: self.cluster_only,
            ..Policy::default()
        };
        self.dataplane.configure(Arc::new(Settings { policy, ..(*settings()).clone() }));
        Ok(())
    }

    fn reaches(&self, other: &Self, how: Usability) -> Result<()> {
        let usabilities = self.backbone.as_ref().context("it has a backbone")?.usabilities();
        let what = format!("{} reaches {} by {how:?}", self.number, other.number);
        eventually(&what, || (usabilities.of(MemberId(other.number)) == how).then_some(()))
    }

    /// Packets that its link has carried away.
    fn sent(&self) -> u64 {
        let report = self.backbone.as_ref().map(Backbone::report).unwrap_or_default();
        report.iter().map(|link| link.counts.sent_packets).sum()
    }

    fn client(&self) -> Result<TurnClient> {
        TurnClient::to(&self.dataplane, Transport::Udp, "127.0.0.1", "alice")
    }
}

/// Two relays that know each other, linked.
fn relays(first: &str, second: &str, public: bool) -> Result<[Relay; 2]> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let ca = params.self_signed(&key)?.pem();
    let issuer = Issuer::new(params, key);
    let issue = |number| {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(format!("turnpike://relay/{}", node(number)).try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &issuer)?.pem().into_bytes();
        Ok::<_, anyhow::Error>(Identity { ca: ca.clone().into_bytes(), certificate, key: key.serialize_pem().into() })
    };
    let pair = [relay(1, first, &issue(1)?, public)?, relay(2, second, &issue(2)?, public)?];
    pair[0].meet(&pair[1])?;
    pair[1].meet(&pair[0])?;
    pair[0].reaches(&pair[1], Usability::Link)?;
    pair[1].reaches(&pair[0], Usability::Link)?;
    Ok(pair)
}

fn exchange(
    alice: &mut TurnClient,
    bob: &mut TurnClient,
    addresses: (SocketAddr, SocketAddr),
    data: &[u8],
) -> Result<()> {
    alice.send(addresses.1, data)?;
    ensure!(bob.receive()? == (addresses.0, data.to_vec()), "there, {} bytes", data.len());
    bob.send(addresses.0, data)?;
    ensure!(alice.receive()? == (addresses.1, data.to_vec()), "back, {} bytes", data.len());
    Ok(())
}

#[test]
fn relayed_address_to_relayed_address_goes_by_the_backbone_alone() -> Result<()> {
    // Neither relay has a relayed socket: there is no other way.
    let relays = relays("127.1.21.1", "127.1.21.2", false)?;
    let (mut alice, mut bob) = (relays[0].client()?, relays[1].client()?);
    let (of_alice, of_bob) = (alice.allocate()?, bob.allocate()?);
    ensure!(UdpSocket::bind(of_alice).is_ok(), "the relayed port is bound");
    // Nobody outside of the cluster is a peer.
    ensure!(alice.permit("127.0.0.1:9".parse()?).is_err(), "a peer outside is permitted");

    alice.bind_channel(0x4000, of_bob)?;
    alice.send(of_bob, b"unwanted")?;
    let unwanted = || (dropped(&relays[1].dataplane, "no_permission") == 1).then_some(());
    eventually("the receiver's permissions are asked", unwanted)?;
    bob.permit(of_alice)?;
    for length in [0, 1, 200, 1172, 1200, 1400, 1472] {
        let data: Vec<u8> = (0..length).map(|at: u32| at as u8).collect();
        exchange(&mut alice, &mut bob, (of_alice, of_bob), &data)?;
    }
    eventually("the links count what they carry", || relays.iter().all(|relay| relay.sent() >= 7).then_some(()))?;
    // abuse.md A: members' other ports never, and nobody at a relayed one is nobody.
    for port in [3478, relays[1].backbone.as_ref().context("a backbone")?.local_addresses()[0].port()] {
        let other = SocketAddr::new(of_bob.ip(), port);
        if relays[1].ports.contains(&port) {
            continue;
        }
        alice.send(other, b"to a service of a member")?;
        eventually("it is dropped", || (dropped(&relays[0].dataplane, "nobody_there") >= 1).then_some(()))?;
    }
    Ok(())
}

#[test]
fn without_the_link_a_pair_goes_on_by_plain_udp() -> Result<()> {
    let mut relays = relays("127.1.21.3", "127.1.21.4", true)?;
    let (mut alice, mut bob) = (relays[0].client()?, relays[1].client()?);
    let (of_alice, of_bob) = (alice.allocate()?, bob.allocate()?);
    alice.bind_channel(0x4000, of_bob)?;
    bob.permit(of_alice)?;
    exchange(&mut alice, &mut bob, (of_alice, of_bob), b"by the link")?;
    eventually("the link counts", || (relays[0].sent() == 1 && relays[1].sent() == 1).then_some(()))?;
    drop(relays[1].backbone.take());
    relays[0].reaches(&relays[1], Usability::PlainUdp)?;
    for _ in 0..20 {
        alice.send(of_bob, b"by plain UDP")?;
        ensure!(bob.receive()? == (of_alice, b"by plain UDP".to_vec()));
    }
    Ok(())
}

/// Passes datagrams on from an address of its own to a relay that can be changed, as a load balancer does.
struct Balancer {
    front: SocketAddr,
    back: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
}

fn balancer(target: SocketAddr) -> Result<Balancer> {
    let (front, back) = (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?);
    let balancer =
        Balancer { front: front.local_addr()?, back: back.local_addr()?, target: Arc::new(Mutex::new(target)) };
    let client = Arc::new(Mutex::new(None));
    let (known, target) = (Arc::clone(&client), Arc::clone(&balancer.target));
    let (answers, asked) = (back.try_clone()?, front.try_clone()?);
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = front.recv_from(&mut buffer) {
            *known.lock().unwrap_or_else(PoisonError::into_inner) = Some(from);
            let target = *target.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = back.send_to(&buffer[..length], target);
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, _)) = answers.recv_from(&mut buffer) {
            if let Some(client) = *client.lock().unwrap_or_else(PoisonError::into_inner) {
                let _ = asked.send_to(&buffer[..length], client);
            }
        }
    });
    Ok(balancer)
}

#[test]
fn a_client_whose_packets_arrive_at_another_relay_keeps_its_allocation() -> Result<()> {
    let mut relays = relays("127.1.21.5", "127.1.21.6", true)?;
    let at = relays.each_ref().map(|relay| relay.dataplane.listen()[0].bind);
    let balancer = balancer(at[0])?;
    // What a controller would say.
    let mut lookups = relays[1].lookups.take().context("lookups")?;
    let (asking, client) = (Arc::clone(&relays[1].dataplane), balancer.back);
    thread::spawn(move || {
        while let Some(lookup) = lookups.blocking_recv() {
            asking.located(lookup, (lookup.client == client).then_some(MemberId(1)));
        }
    });
    let mut alice = TurnClient::new(Transport::Udp, "127.0.0.1", balancer.front, "alice")?;
    let relayed = alice.allocate()?;
    let peer = UdpSocket::bind("127.0.0.1:0")?;
    peer.set_read_timeout(Some(Duration::from_millis(50)))?;
    let address = peer.local_addr()?;
    alice.bind_channel(0x4000, address)?;
    alice.send(address, b"here")?;
    let mut buffer = [0; 64];
    ensure!(peer.recv_from(&mut buffer)? == (4, relayed));

    for turn in [1, 0, 1] {
        *balancer.target.lock().unwrap_or_else(PoisonError::into_inner) = at[turn];
        // Data first: it is what arrives first in a call.
        let began = Instant::now();
        let back = format!("back by {turn}, {began:?}");
        let arrives = eventually("data arrives both ways", || {
            alice.send(address, b"there").ok()?;
            let (_, from) = peer.recv_from(&mut buffer).ok()?;
            peer.send_to(back.as_bytes(), from).ok()?;
            while let Some((_, data)) = alice.receive_soon() {
                if data == back.as_bytes() {
                    return Some(());
                }
            }
            None
        });
        arrives.with_context(|| {
            let drops = relays
                .each_ref()
                .map(|relay| relay.dataplane.snapshots().iter().map(|w| w.dropped.clone()).collect::<Vec<_>>());
            format!("at {turn}: {drops:?}")
        })?;
        ensure!(began.elapsed() < Duration::from_secs(5), "only after {:?}", began.elapsed());
        // Requests are answered where they come from.
        alice.permit(address)?;
    }
    // Whoever is not known is as new: no answer that it would not have got anyway, and no state.
    let stranger = UdpSocket::bind("127.0.0.1:0")?;
    for _ in 0..100 {
        stranger.send_to(b"\x40\x00\x00\x04data", at[1])?;
    }
    eventually("a stranger's data is dropped", || {
        (dropped(&relays[1].dataplane, "no_allocation") >= 100).then_some(())
    })?;
    Ok(())
}
