//! `turnctl discover`, `turnctl credentials`: what a client of the cluster would be given.

use std::net::IpAddr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use turn_core::text;
use turnpike_proto::v1::steering_client::SteeringClient;
use turnpike_proto::v1::{Credential, CredentialsRequest, DiscoverRequest, DiscoverResponse, Relay, Transport};

use super::allocations::{UserName, user_name};
use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::{Failure, Result};
use crate::output::{Block, Cell, Output, View};
use crate::units;

/// Ask which relays a client would be sent to, with credentials for them (role operator)
#[derive(Args, Debug)]
#[command(after_help = DISCOVER_EXAMPLES)]
pub(crate) struct DiscoverArgs {
    /// Region of the client
    #[arg(long, default_value = "", hide_default_value = true)]
    region: String,
    /// Only these ways to a relay
    #[arg(long, value_enum, value_delimiter = ',')]
    transport: Vec<Via>,
    /// Name the credentials are made out to
    #[arg(long, default_value = "turnctl", value_parser = user_name)]
    user: UserName,
    /// At most this many relays; 0 leaves it to the controller
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    limit: u32,
    /// Life of the credentials (1h, 90s)
    #[arg(long, value_parser = units::parse_span, value_name = "TIME")]
    ttl: Option<Duration>,
    /// IP of the client: its network decides which relays are near
    #[arg(long, value_name = "ADDR")]
    client: Option<IpAddr>,
    /// Name of the call: its ends get one relay, or the cheapest pair
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    session: String,
}

const DISCOVER_EXAMPLES: &str = "\
Examples:
  turnctl discover --region us
  turnctl discover --transport tcp -o json";

/// Mint TURN credentials (role operator)
#[derive(Args, Debug)]
#[command(after_help = CREDENTIALS_EXAMPLES)]
pub(crate) struct CredentialsArgs {
    /// Name they are made out to
    #[arg(long, default_value = "turnctl", value_parser = user_name)]
    user: UserName,
    /// Their life (1h, 90s)
    #[arg(long, value_parser = units::parse_span, value_name = "TIME")]
    ttl: Option<Duration>,
}

const CREDENTIALS_EXAMPLES: &str = "\
Examples:
  turnctl credentials --user alice --ttl 1h
  turnctl credentials -o json | jq -r .password";

/// A way to a relay.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Via {
    Udp,
    Tcp,
    Tls,
    Dtls,
}

impl Via {
    fn wire(self) -> Transport {
        match self {
            Self::Udp => Transport::Udp,
            Self::Tcp => Transport::Tcp,
            Self::Tls => Transport::Tls,
            Self::Dtls => Transport::Dtls,
        }
    }
}

pub(crate) async fn run(args: &DiscoverArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let request = DiscoverRequest {
        region: args.region.clone(),
        transports: wire(&args.transport),
        user: args.user.0.clone(),
        limit: args.limit,
        ttl_seconds: seconds(args.ttl)?,
        client: args.client.map(|client| client.to_string()).unwrap_or_default(),
        session: args.session.clone().into_bytes(),
        home: String::new(),
    };
    let answer = ask(&connection.connect().await?, request).await?;
    output.show(&DiscoverView::from(answer))
}

pub(crate) async fn credentials(args: &CredentialsArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let request = CredentialsRequest { user: args.user.0.clone(), ttl_seconds: seconds(args.ttl)? };
    let cluster = connection.connect().await?;
    let answer = SteeringClient::new(cluster.channel.clone())
        .credentials(request)
        .await
        .map_err(|status| cluster.failure("get credentials", &status))?;
    output.show(&CredentialView::from(answer.into_inner()))
}

/// Transports as the request carries them.
pub(crate) fn wire(transports: &[Via]) -> Vec<i32> {
    transports.iter().map(|via| via.wire() as i32).collect()
}

/// Asks the controller's steering.
pub(crate) async fn ask(cluster: &Cluster, request: DiscoverRequest) -> Result<DiscoverResponse> {
    SteeringClient::new(cluster.channel.clone())
        .discover(request)
        .await
        .map(tonic::Response::into_inner)
        .map_err(|status| cluster.failure("discover relays", &status))
}

/// Whole seconds, at least one; 0 leaves it to the controller.
fn seconds(ttl: Option<Duration>) -> Result<u32> {
    let Some(ttl) = ttl else { return Ok(0) };
    u32::try_from(ttl.as_secs().max(1)).map_err(|_| Failure::usage("--ttl is longer than a century"))
}

#[derive(Debug, Serialize)]
struct DiscoverView {
    region: String,
    relays: Vec<RelayView>,
    credential: Option<CredentialView>,
}

#[derive(Debug, Serialize)]
struct RelayView {
    node_id: String,
    region: String,
    distance_ms: u32,
    uris: Vec<String>,
}

#[derive(Debug, Serialize)]
struct CredentialView {
    /// Escaped: opaque bytes.
    username: String,
    password: String,
    realm: String,
    ttl_seconds: u32,
    expires_at: Option<String>,
}

impl From<DiscoverResponse> for DiscoverView {
    fn from(answer: DiscoverResponse) -> Self {
        let relay = |relay: Relay| RelayView {
            node_id: relay.node_id,
            region: relay.region,
            distance_ms: relay.distance_ms,
            uris: relay.uris,
        };
        Self {
            region: answer.region,
            relays: answer.relays.into_iter().map(relay).collect(),
            credential: answer.credential.map(CredentialView::from),
        }
    }
}

impl From<Credential> for CredentialView {
    fn from(credential: Credential) -> Self {
        Self {
            username: text::escape(&credential.username),
            password: credential.password,
            realm: credential.realm,
            ttl_seconds: credential.ttl_seconds,
            expires_at: units::timestamp(credential.expires_at.saturating_mul(1000)),
        }
    }
}

impl View for DiscoverView {
    fn blocks(&self, wide: bool, now_ms: u64) -> Vec<Block> {
        let rows = self.relays.iter().flat_map(|relay| {
            relay.uris.iter().enumerate().map(move |(at, uri)| {
                let first = |text: &str| if at == 0 { Cell::from(text) } else { Cell::from(" ") };
                vec![
                    first(&relay.node_id),
                    first(&relay.region),
                    first(&format!("{} ms", relay.distance_ms)),
                    Cell::from(uri),
                ]
            })
        });
        let mut blocks = vec![Block::Table { head: vec!["NODE", "REGION", "DISTANCE", "URI"], rows: rows.collect() }];
        blocks.extend(self.credential.iter().flat_map(|credential| credential.blocks(wide, now_ms)));
        blocks
    }
}

impl View for CredentialView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let life = units::span(Duration::from_secs(self.ttl_seconds.into()));
        vec![Block::Fields(vec![
            ("Username", Cell::from(&self.username)),
            ("Password", Cell::from(&self.password)),
            ("Realm", Cell::from(&self.realm)),
            ("Expires", Cell::from(format!("in {life}, {}", self.expires_at.as_deref().unwrap_or("-")))),
        ])]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Format, render};

    #[test]
    fn relays_and_credentials_stand_together() {
        let answer = DiscoverResponse {
            relays: vec![Relay {
                node_id: "eu-1".into(),
                region: "eu".into(),
                uris: vec!["turn:192.0.2.1:3478?transport=udp".into(), "turn:192.0.2.1:3478?transport=tcp".into()],
                distance_ms: 12,
                ..Relay::default()
            }],
            credential: Some(Credential {
                username: b"1700003600:alice".to_vec(),
                password: "c2VjcmV0".into(),
                realm: "turnpike".into(),
                ttl_seconds: 3_600,
                expires_at: 1_700_003_600,
            }),
            region: "eu".into(),
        };
        let view = DiscoverView::from(answer);
        let expected = "\
NODE   REGION   DISTANCE   URI
eu-1   eu       12 ms      turn:192.0.2.1:3478?transport=udp
                           turn:192.0.2.1:3478?transport=tcp

Username   1700003600:alice
Password   c2VjcmV0
Realm      turnpike
Expires    in 1h, 2023-11-14T23:13:20Z
";
        assert_eq!(render(&view, Format::Table, false, 0).expect("renders"), expected);
        let yaml = render(&view, Format::Yaml, false, 0).expect("renders");
        let expected = "\
region: eu
relays:
- node_id: eu-1
  region: eu
  distance_ms: 12
  uris:
  - turn:192.0.2.1:3478?transport=udp
  - turn:192.0.2.1:3478?transport=tcp
credential:
  username: 1700003600:alice
  password: c2VjcmV0
  realm: turnpike
  ttl_seconds: 3600
  expires_at: 2023-11-14T23:13:20Z
";
        assert_eq!(yaml, expected);
    }
}
