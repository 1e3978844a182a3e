//! An API server of Kubernetes as far as a relay asks one: HTTPS with a bearer token, one Node with its watch, the
//! EndpointSlices of the controllers, a Service behind a load balancer. The objects are the shape of a 1.34 server's.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.a-token.of-this-pod";

/// A server that runs until the process ends.
pub(crate) struct Api {
    /// `https://127.0.0.1:port`.
    pub(crate) url: String,
    /// The service account's directory.
    pub(crate) credentials: PathBuf,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    now: Mutex<Now>,
    changed: Condvar,
}

#[derive(Default)]
struct Now {
    node: Value,
    version: u64,
    slices: Value,
    ingress: Value,
    away: bool,
    /// Watches of versions below this one are told that it is gone, and watches that are open are ended.
    compacted: u64,
    reads: u32,
    watches: u32,
}

impl Api {
    /// Starts it, and writes the service account's files below `directory`. The only controller is at `controller`.
    pub(crate) fn start(directory: &Path, controller: &str) -> Self {
        let (ca, config) = tls();
        let credentials = directory.join("serviceaccount");
        std::fs::create_dir(&credentials).expect("made");
        for (name, text) in [("ca.crt", ca.as_str()), ("token", TOKEN), ("namespace", "turnpike-relay")] {
            std::fs::write(credentials.join(name), text).expect("written");
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("https://{}", listener.local_addr().expect("bound"));
        let mut now = Now {
            node: serde_json::from_str(include_str!("node.json")).expect("JSON"),
            version: 18231,
            slices: serde_json::from_str(include_str!("endpoint-slices.json")).expect("JSON"),
            ingress: json!([{ "ip": "203.0.113.9", "ipMode": "VIP" }]),
            ..Now::default()
        };
        now.controller(controller);
        let state = Arc::new(State { now: Mutex::new(now), changed: Condvar::new() });
        let served = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (state, config) = (Arc::clone(&served), Arc::clone(&config));
                // A relay that is killed breaks its connections.
                std::thread::spawn(move || drop(serve(stream, config, &state)));
            }
        });
        Self { url, credentials, state }
    }

    /// As `kubectl cordon` and `kubectl uncordon` do.
    pub(crate) fn cordon(&self, cordoned: bool) {
        self.change(|now| {
            let spec = now.node["spec"].as_object_mut().expect("an object");
            // The server leaves out what is false.
            if cordoned {
                spec.insert("unschedulable".into(), json!(true));
            } else {
                spec.remove("unschedulable");
            }
        });
    }

    /// Ends every watch, and forgets the versions there were.
    pub(crate) fn compact(&self) {
        self.change(|now| now.compacted = now.version + 1);
    }

    /// The controller is here now.
    pub(crate) fn controller_moves(&self, url: &str) {
        self.change(|now| now.controller(url));
    }

    /// Answers nobody any more, or does again.
    pub(crate) fn away(&self, away: bool) {
        self.change(|now| now.away = away);
    }

    /// How often the Node was read, and watched.
    pub(crate) fn asked(&self) -> (u32, u32) {
        let now = self.state.now.lock().expect("whole");
        (now.reads, now.watches)
    }

    fn change(&self, change: impl FnOnce(&mut Now)) {
        let mut now = self.state.now.lock().expect("whole");
        now.version += 1;
        let version = now.version.to_string();
        change(&mut now);
        now.node["metadata"]["resourceVersion"] = json!(version);
        self.state.changed.notify_all();
    }
}

impl Now {
    fn controller(&mut self, url: &str) {
        let port: u16 = url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
        self.slices["items"][0]["ports"][1]["port"] = json!(port);
    }
}

type Stream = StreamOwned<ServerConnection, TcpStream>;

fn serve(tcp: TcpStream, config: Arc<ServerConfig>, state: &State) -> std::io::Result<()> {
    let connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut stream = StreamOwned::new(connection, tcp);
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).map_err(std::io::Error::other)?;
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut now = state.now.lock().expect("whole");
    if now.away {
        return Ok(());
    }
    let status = |code: u16, reason: &str| {
        (code, json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code }))
    };
    let bearer = format!("authorization: Bearer {TOKEN}\r\n");
    let (code, body) = match path.split_once('?') {
        _ if !head.contains(&bearer) => status(401, "Unauthorized"),
        None if path == "/api/v1/nodes/node-1" => {
            now.reads += 1;
            (200, now.node.clone())
        }
        None if path == "/api/v1/namespaces/turnpike-relay/services/turnpike-relay-0" => {
            (200, json!({ "kind": "Service", "status": { "loadBalancer": { "ingress": now.ingress } } }))
        }
        Some((
            "/apis/discovery.k8s.io/v1/namespaces/turnpike-control/endpointslices",
            "labelSelector=kubernetes.io%2Fservice-name%3Dturnpike-controller",
        )) => (200, now.slices.clone()),
        Some(("/api/v1/nodes", query))
            if query.contains("watch=1") && query.contains("fieldSelector=metadata.name%3Dnode-1&") =>
        {
            now.watches += 1;
            drop(now);
            let version = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion="));
            let version = version.and_then(|version| version.parse().ok()).expect("a version");
            return watch(&mut stream, state, version);
        }
        _ => status(404, "NotFound"),
    };
    drop(now);
    let body = body.to_string();
    write!(
        stream,
        "HTTP/1.1 {code} x\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )?;
    stream.flush()
}

/// Events behind `version`, a chunk each.
fn watch(stream: &mut Stream, state: &State, version: u64) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")?;
    stream.flush()?;
    let mut said = version;
    let mut now = state.now.lock().expect("whole");
    loop {
        let event = if said < now.compacted {
            json!({ "type": "ERROR", "object": { "kind": "Status", "status": "Failure", "reason": "Expired", "code": 410 } })
        } else if now.version > said {
            json!({ "type": "MODIFIED", "object": now.node })
        } else if now.away {
            return Ok(());
        } else {
            now = state.changed.wait_timeout(now, Duration::from_secs(60)).expect("whole").0;
            continue;
        };
        let gone = event["type"] == "ERROR";
        said = now.version;
        drop(now);
        // In two chunks, cut where nothing ends.
        let line = format!("{event}\n");
        for half in [&line[..line.len() / 2], &line[line.len() / 2..]] {
            write!(stream, "{:x}\r\n{half}\r\n", half.len())?;
            stream.flush()?;
        }
        if gone {
            write!(stream, "0\r\n\r\n")?;
            return stream.flush();
        }
        now = state.now.lock().expect("whole");
    }
}

fn tls() -> (String, Arc<ServerConfig>) {
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).expect("signed").pem();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
    let certificate = params.signed_by(&key, &issuer).expect("signed").pem();
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
    let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).expect("PEM");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a pair");
    (ca_pem, Arc::new(config))
}
