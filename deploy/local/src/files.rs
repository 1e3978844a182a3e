//! Certificates and configuration files of the local cluster.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;
use turnctl::pki::{self, CA_CERTIFICATE, Ca, Identity};

use crate::plan::{Plan, RelayPlan};
use crate::state_directory::{StateDirectory, write_whole};

/// Id of the only controller.
pub const CONTROLLER: &str = "controller-1";

/// Realm of the credentials.
pub const REALM: &str = "turnpike";

/// Life of the certificates; they are made anew at each start, so it bounds how long one run may last.
const VALIDITY: Duration = Duration::from_secs(90 * 86_400);

/// Name of the context in [`turnctl_file`].
const CONTEXT: &str = "local";

/// Makes certificates for all members and for the person at the keyboard. The authority is kept over runs, so that a
/// browser that was told to trust it still does.
///
/// # Errors
/// One line naming the file or the certificate.
pub fn make_certificates(directory: &StateDirectory, plan: &Plan, own_addresses: &[IpAddr]) -> Result<()> {
    let pki = directory.pki();
    let ca = authority(&pki)?;
    let issue = |identity: Identity, dns: &[String], ips: &[IpAddr]| -> Result<()> {
        let stem = identity.file_stem();
        let issued = ca.issue(&identity, dns, ips, VALIDITY).with_context(|| format!("certificate {identity}"))?;
        issued.write(&pki, &stem, true)?;
        Ok(())
    };
    issue(Identity::Controller(CONTROLLER.into()), &[], &[Ipv4Addr::LOCALHOST.into()])?;
    for relay in &plan.relays {
        issue(Identity::Relay(relay.id.into()), &[], &[])?;
        let mut ips = vec![relay.public_ip.into(), relay.relay_ip.into()];
        ips.dedup();
        issue(turn_identity(relay), &["localhost".to_owned()], &ips)?;
    }
    issue(Identity::Admin(CONTEXT.into()), &[], &[])?;
    if plan.https {
        let mut ips: Vec<IpAddr> = plan.page_hosts.iter().map(|&ip| ip.into()).chain(own_addresses.to_vec()).collect();
        ips.sort();
        ips.dedup();
        issue(page_identity(), &["localhost".to_owned()], &ips)?;
    }
    Ok(())
}

/// Whom the call page's certificate speaks for: browsers look at its names only, controllers give it the least role.
pub fn page_identity() -> Identity {
    Identity::Viewer("call-page".into())
}

/// Whom the certificate speaks for that clients of a relay meet: they look at its IPs only.
fn turn_identity(relay: &RelayPlan) -> Identity {
    Identity::Viewer(format!("turn-{}", relay.id))
}

/// The authority of earlier runs, or a new one where there is none or it cannot be used any more.
fn authority(pki: &Path) -> Result<Ca> {
    let kept = Ca::load(pki).ok().filter(|ca| {
        let probe = ca.issue(&Identity::Viewer("probe".into()), &[], &[], VALIDITY);
        probe.is_ok()
    });
    match kept {
        Some(ca) => Ok(ca),
        None => {
            let ca = pki::create_ca("Turnpike local cluster")?;
            ca.write(pki, true)?;
            Ok(ca)
        }
    }
}

/// Writes the configuration of every process and the context file of `turnctl`.
///
/// # Errors
/// One line naming the file.
pub fn write_configurations(directory: &StateDirectory, plan: &Plan, log: &str, console_key: &str) -> Result<()> {
    write_whole(&controller_file(directory), &render(&ControllerFile::new(directory, plan, log, console_key))?)?;
    for relay in &plan.relays {
        write_whole(&relay_file(directory, relay.id), &render(&RelayFile::new(directory, plan, relay, log))?)?;
    }
    let stem = Identity::Admin(CONTEXT.into()).file_stem();
    let context = TurnctlContext {
        controllers: [format!("https://{}", plan.grpc)],
        ca: Path::new("pki").join(CA_CERTIFICATE),
        certificate: Path::new("pki").join(format!("{stem}.pem")),
        key: Path::new("pki").join(format!("{stem}.key")),
    };
    let contexts = TurnctlFile { current: CONTEXT, contexts: BTreeMap::from([(CONTEXT, context)]) };
    write_whole(&turnctl_file(directory), &render(&contexts)?)
}

/// A key for the console, good for one run.
///
/// # Errors
/// The system has no randomness.
pub fn console_key() -> Result<String> {
    let mut words = [0; 2];
    for word in &mut words {
        *word = getrandom::u64().context("no randomness for the console's key")?;
    }
    Ok(format!("{:016x}{:016x}", words[0], words[1]))
}

/// Configuration of the controller.
pub fn controller_file(directory: &StateDirectory) -> PathBuf {
    directory.config().join("controller.toml")
}

/// Configuration of one relay.
pub fn relay_file(directory: &StateDirectory, id: &str) -> PathBuf {
    directory.config().join(format!("{id}.toml"))
}

/// Context file of `turnctl`; its paths are relative to it.
pub fn turnctl_file(directory: &StateDirectory) -> PathBuf {
    directory.path().join("turnctl.toml")
}

/// Certificate and key of the call page, where it is served over TLS.
pub fn page_certificate(directory: &StateDirectory) -> (PathBuf, PathBuf) {
    let stem = page_identity().file_stem();
    (directory.pki().join(format!("{stem}.pem")), directory.pki().join(format!("{stem}.key")))
}

fn render(file: &impl Serialize) -> Result<String> {
    let text = toml::to_string(file).context("configuration as TOML")?;
    Ok(format!("# Written by turnpike-local at each start: changes here are lost.\n{text}"))
}

#[derive(Serialize)]
struct Tls {
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Tls {
    fn of(directory: &StateDirectory, identity: &Identity) -> Self {
        let (pki, stem) = (directory.pki(), identity.file_stem());
        Self {
            ca: pki.join(CA_CERTIFICATE),
            certificate: pki.join(format!("{stem}.pem")),
            key: pki.join(format!("{stem}.key")),
        }
    }
}

/// The context file as `turnctl` reads it.
#[derive(Serialize)]
struct TurnctlFile {
    current: &'static str,
    contexts: BTreeMap<&'static str, TurnctlContext>,
}

#[derive(Serialize)]
struct TurnctlContext {
    controllers: [String; 1],
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

/// The keys of relay-node's configuration that differ from its defaults here.
#[derive(Serialize)]
struct RelayFile<'a> {
    node_id: &'a str,
    region: &'a str,
    state_dir: PathBuf,
    listen: [String; 3],
    relay_ip: Ipv4Addr,
    public_ip: Ipv4Addr,
    controllers: [String; 1],
    http: SocketAddr,
    allow_loopback_peers: bool,
    /// Whoever stops the cluster stops its calls too.
    drain_deadline: u32,
    log: &'a str,
    backbone: Backbone,
    certificates: [Certificate; 1],
    tls: Tls,
}

/// How relays reach one another.
#[derive(Serialize)]
struct Backbone {
    listen: [String; 1],
}

/// What clients meet on TLS.
#[derive(Serialize)]
struct Certificate {
    certificate: PathBuf,
    key: PathBuf,
}

impl<'a> RelayFile<'a> {
    fn new(directory: &StateDirectory, plan: &Plan, relay: &'a RelayPlan, log: &'a str) -> Self {
        let Tls { certificate, key, .. } = Tls::of(directory, &turn_identity(relay));
        Self {
            node_id: relay.id,
            region: relay.region,
            state_dir: directory.relay(relay.id, relay.public_ip),
            listen: [
                format!("udp://{}", relay.listen),
                format!("tcp://{}", relay.listen),
                format!("tls://{}", relay.listen_tls),
            ],
            relay_ip: relay.relay_ip,
            public_ip: relay.public_ip,
            controllers: [format!("https://{}", plan.grpc)],
            http: relay.http,
            allow_loopback_peers: relay.is_lab(),
            drain_deadline: 0,
            log,
            backbone: Backbone { listen: [relay.backbone.to_string()] },
            certificates: [Certificate { certificate, key }],
            tls: Tls::of(directory, &Identity::Relay(relay.id.into())),
        }
    }
}

#[derive(Serialize)]
struct Store {
    kind: &'static str,
    path: PathBuf,
}

#[derive(Serialize)]
struct Distance {
    from: &'static str,
    to: &'static str,
    ms: u32,
}

/// The keys of the controller's configuration that differ from its defaults here.
#[derive(Serialize)]
struct ControllerFile<'a> {
    id: &'static str,
    region: &'static str,
    grpc: SocketAddr,
    http: SocketAddr,
    realm: &'static str,
    log: &'a str,
    tls: Tls,
    store: Store,
    distances: [Distance; 1],
    regions: [Region; 2],
    console_keys: [ConsoleKey<'a>; 1],
}

/// Where a region is on the console's map.
#[derive(Serialize)]
struct Region {
    name: &'static str,
    latitude: f64,
    longitude: f64,
}

/// Who may act at the console.
#[derive(Serialize)]
struct ConsoleKey<'a> {
    name: &'static str,
    role: &'static str,
    key: &'a str,
}

impl<'a> ControllerFile<'a> {
    fn new(directory: &StateDirectory, plan: &Plan, log: &'a str, console_key: &'a str) -> Self {
        Self {
            id: CONTROLLER,
            region: "eu",
            grpc: plan.grpc,
            http: plan.http,
            realm: REALM,
            log,
            tls: Tls::of(directory, &Identity::Controller(CONTROLLER.into())),
            store: Store { kind: "embedded", path: directory.store() },
            // What a packet needs across the Atlantic, about.
            distances: [Distance { from: "eu", to: "us", ms: 90 }],
            regions: [
                Region { name: "eu", latitude: 50.1, longitude: 8.7 },
                Region { name: "us", latitude: 39.0, longitude: -77.5 },
            ],
            console_keys: [ConsoleKey { name: "you", role: "operator", key: console_key }],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::plan::{Network, plan};

    struct Alone;

    impl Network for Alone {
        fn is_local(&self, _: Ipv4Addr) -> bool {
            true
        }

        fn source_towards(&self, _: Ipv4Addr) -> Option<Ipv4Addr> {
            None
        }
    }

    fn read(path: &Path) -> toml::Table {
        fs::read_to_string(path).expect("file").parse().expect("TOML")
    }

    #[test]
    fn every_process_gets_its_addresses_state_and_certificate() {
        let parent = tempfile::tempdir().expect("directory");
        let directory = StateDirectory::open(parent.path(), false).expect("directory");
        let plan = plan(&[], true, 0, &Alone).expect("plan");
        make_certificates(&directory, &plan, &[]).expect("certificates");
        let key = console_key().expect("randomness");
        write_configurations(&directory, &plan, "info", &key).expect("configurations");

        let controller = read(&controller_file(&directory));
        assert_eq!(controller["grpc"].as_str(), Some("127.0.0.1:9443"));
        assert_eq!(controller["store"]["kind"].as_str(), Some("embedded"));
        assert_eq!(controller["distances"][0]["ms"].as_integer(), Some(90));
        assert_eq!((controller["console_keys"][0]["key"].as_str(), key.len()), (Some(key.as_str()), 32));
        let mut states = Vec::new();
        for id in ["eu-1", "eu-2", "us-1"] {
            let relay = read(&relay_file(&directory, id));
            assert_eq!(relay["node_id"].as_str(), Some(id));
            assert_eq!(relay["controllers"][0].as_str(), Some("https://127.0.0.1:9443"));
            assert_eq!(relay["allow_loopback_peers"].as_bool(), Some(true));
            assert_eq!(relay["relay_ip"], relay["public_ip"]);
            for key in ["ca", "certificate", "key"] {
                let file = relay["tls"][key].as_str().expect("path");
                assert!(Path::new(file).is_file(), "{id}: {key} {file}");
            }
            assert_eq!(relay["listen"][2].as_str().map(|it| it.ends_with(":5349")), Some(true));
            assert_eq!(relay["backbone"]["listen"][0].as_str().map(|it| it.ends_with(":3480")), Some(true));
            for key in ["certificate", "key"] {
                let file = relay["certificates"][0][key].as_str().expect("path");
                assert!(Path::new(file).is_file(), "{id}: {key} {file}");
            }
            states.push(relay["state_dir"].as_str().expect("path").to_owned());
        }
        states.dedup();
        assert_eq!(states.len(), 3, "no two relays share a state directory");
        let context = &read(&turnctl_file(&directory))["contexts"]["local"];
        let key = context["key"].as_str().expect("path");
        assert!(directory.path().join(key).is_file(), "paths in the context file are relative to it");
        assert!(page_certificate(&directory).0.is_file());
    }

    #[test]
    fn the_authority_is_kept_and_one_that_is_damaged_is_replaced() {
        let parent = tempfile::tempdir().expect("directory");
        let directory = StateDirectory::open(parent.path(), false).expect("directory");
        let plan = plan(&[], false, 0, &Alone).expect("plan");
        let ca = directory.pki().join(CA_CERTIFICATE);
        make_certificates(&directory, &plan, &[]).expect("certificates");
        let first = fs::read_to_string(&ca).expect("authority");
        make_certificates(&directory, &plan, &[]).expect("certificates");
        assert_eq!(fs::read_to_string(&ca).expect("authority"), first);
        fs::write(&ca, "not a certificate").expect("damage");
        make_certificates(&directory, &plan, &[]).expect("certificates");
        assert_ne!(fs::read_to_string(&ca).expect("authority"), first);
        pki::Facts::from_pem(&fs::read_to_string(&ca).expect("authority")).expect("a certificate again");
    }
}
