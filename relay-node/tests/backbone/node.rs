//! Relays of a small cluster that are nothing but their backbone.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber,
};
use relay_node::backbone::{
    Backbone, BackboneOutbox, Deliver, Identity, Inbound, LinkReport, Member, MemberList, Outbound, Settings, Usability,
};
use tokio::sync::watch;
use turn_core::{IpMeta, MemberId};

use crate::wire::{Conditions, Wire};

/// Everything that is waited for comes sooner.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// An authority.
pub(crate) struct Ca {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub(crate) fn new() -> Result<Self> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { certificate, issuer: Issuer::new(params, key) })
    }

    /// A certificate with this URI and serial number.
    pub(crate) fn issue(&self, uri: &str, serial: u8) -> Result<Identity> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.to_owned().try_into()?)];
        params.serial_number = Some(SerialNumber::from_slice(&[serial]));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity {
            ca: self.certificate.clone().into_bytes(),
            certificate: certificate.pem().into_bytes(),
            key: key.serialize_pem().into_bytes(),
        })
    }
}

/// What a node has been handed.
pub(crate) type Got = (Inbound, Vec<u8>, Instant);

struct Collect(mpsc::Sender<Got>);

impl Deliver for Collect {
    fn deliver(&mut self, what: Inbound, packet: &[u8]) -> bool {
        self.0.send((what, packet.to_vec(), Instant::now())).is_ok()
    }

    fn flush(&mut self) {}
}

/// A relay's backbone. Its relay IP is 192.0.2.`number`, its ports are 50000 to 50999, its number is `number` to all.
pub(crate) struct Node {
    pub(crate) number: u8,
    pub(crate) name: String,
    pub(crate) backbone: Backbone,
    pub(crate) outbox: BackboneOutbox,
    pub(crate) got: mpsc::Receiver<Got>,
    members: watch::Sender<Arc<MemberList>>,
}

/// The settings of a test, laid over those of a node.
pub(crate) type Change = fn(&mut Settings);

impl Node {
    pub(crate) fn start(ca: &Ca, number: u8) -> Result<Self> {
        Self::start_with(ca, number, |_| {})
    }

    pub(crate) fn start_with(ca: &Ca, number: u8, change: impl FnOnce(&mut Settings)) -> Result<Self> {
        let identity = ca.issue(&format!("turnpike://relay/relay-{number}"), number)?;
        Self::start_as(identity, number, change)
    }

    /// With a certificate that has been issued.
    pub(crate) fn start_as(identity: Identity, number: u8, change: impl FnOnce(&mut Settings)) -> Result<Self> {
        let name = format!("relay-{number}");
        let mut settings = Settings {
            node_id: name.clone(),
            listen: vec![(Ipv4Addr::LOCALHOST, 0).into()],
            relay_ips: vec![ip(number)],
            private_networks: Vec::new(),
            capacity: None,
            plain_udp: true,
        };
        change(&mut settings);
        let (members, receiver) = watch::channel(Arc::default());
        let (sender, got) = mpsc::channel();
        let (backbone, mut outboxes) = Backbone::start(settings, &identity, receiver, 1, Collect(sender))?;
        let outbox = outboxes.pop().context("one worker")?;
        Ok(Self { number, name, backbone, outbox, got, members })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.backbone.local_addresses()[0]
    }

    pub(crate) fn id(&self) -> MemberId {
        MemberId(self.number.into())
    }

    /// As it stands in the lists of the others, which reach it at `address`.
    pub(crate) fn member_at(&self, address: SocketAddr) -> Member {
        Member {
            id: self.id(),
            node_id: self.name.as_str().into(),
            addresses: vec![address],
            relay_ips: vec![ip(self.number)],
            relay_ports: 50_000..=50_999,
        }
    }

    pub(crate) fn member(&self) -> Member {
        self.member_at(self.address())
    }

    pub(crate) fn set_members(&self, members: Vec<Member>) {
        self.set_list(MemberList { members, revoked_serials: Vec::new() });
    }

    pub(crate) fn set_list(&self, list: MemberList) {
        self.members.send_replace(Arc::new(list));
    }

    pub(crate) fn usability(&self, other: MemberId) -> Usability {
        self.backbone.usabilities().of(other)
    }

    /// Waits until a member is reached in this way.
    pub(crate) fn wait_for(&self, other: MemberId, usability: Usability) -> Result<Duration> {
        let began = Instant::now();
        wait_until(&format!("{} finds {other:?} {usability:?}", self.name), || self.usability(other) == usability)
            .with_context(|| format!("{:?}", self.backbone.report()))?;
        Ok(began.elapsed())
    }

    pub(crate) fn report(&self, other: MemberId) -> Option<LinkReport> {
        self.backbone.report().iter().find(|report| report.member == other).cloned()
    }

    /// Sends from port 50000 + `flow` of this node to the same of another.
    pub(crate) fn send(&mut self, other: &Node, flow: u16, payload: &[u8]) -> bool {
        send(&mut self.outbox, [self.number, other.number], flow, payload)
    }

    /// What comes next.
    pub(crate) fn next(&self) -> Result<Got> {
        Ok(self.got.recv_timeout(PATIENCE)?)
    }

    /// Everything that has come.
    pub(crate) fn all(&self) -> Vec<Got> {
        self.got.try_iter().collect()
    }
}

/// As [`Node::send`], by the outbox of the first of two nodes.
pub(crate) fn send(outbox: &mut BackboneOutbox, [from, to]: [u8; 2], flow: u16, payload: &[u8]) -> bool {
    let what = Outbound::Data {
        member: MemberId(to.into()),
        source: relayed(from, flow),
        destination: relayed(to, flow),
        ip: IpMeta::default(),
    };
    let pushed = outbox.push(what, [payload, b""]).is_ok();
    outbox.wake();
    pushed
}

pub(crate) fn ip(number: u8) -> IpAddr {
    [192, 0, 2, number].into()
}

pub(crate) fn relayed(number: u8, flow: u16) -> SocketAddr {
    (ip(number), 50_000 + flow).into()
}

/// Two nodes that know each other and are linked.
pub(crate) fn pair() -> Result<(Ca, Node, Node)> {
    let ca = Ca::new()?;
    let (one, two) = (Node::start(&ca, 1)?, Node::start(&ca, 2)?);
    one.set_members(vec![two.member()]);
    two.set_members(vec![one.member()]);
    one.wait_for(two.id(), Usability::Link)?;
    two.wait_for(one.id(), Usability::Link)?;
    Ok((ca, one, two))
}

pub(crate) fn wait_until(what: &str, condition: impl Fn() -> bool) -> Result<()> {
    let began = Instant::now();
    while !condition() {
        ensure!(began.elapsed() < PATIENCE, "it has not come true: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Two nodes with a wire between them.
pub(crate) fn wired(conditions: Conditions, change: Change) -> Result<(Ca, Node, Node, Wire)> {
    let ca = Ca::new()?;
    let (one, two) = (Node::start_with(&ca, 1, change)?, Node::start_with(&ca, 2, change)?);
    let wire = Wire::between([one.address(), two.address()], conditions)?;
    one.set_members(vec![two.member_at(wire.ends()[0])]);
    two.set_members(vec![one.member_at(wire.ends()[1])]);
    one.wait_for(two.id(), Usability::Link)?;
    two.wait_for(one.id(), Usability::Link)?;
    Ok((ca, one, two, wire))
}
