//! `turnctl keys`: the rings that relays share, without their secrets, and how they are replaced.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{
    Key, KeyOrigin, KeyRing, KeyState, ListKeysRequest, ListKeysResponse, RetireKeyRequest, RotateKeysRequest,
};

use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::{Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// Between two looks whether a rotation has ended.
const PERIOD: Duration = Duration::from_millis(100);

/// List, rotate and retire the keys that relays share; lists them unless told otherwise
#[derive(Args, Debug)]
#[command(visible_alias = "key")]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    command: Option<KeysCommand>,
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    /// List the keys of every ring, never their secrets
    #[command(visible_alias = "ls", after_help = LIST_EXAMPLES)]
    List,
    /// Replace the newest keys; what was made with the old ones goes on (role admin)
    #[command(after_help = ROTATE_EXAMPLES)]
    Rotate(RotateArgs),
    /// Take a key away at once, whatever is still made with it (role admin)
    #[command(after_help = RETIRE_EXAMPLES)]
    Retire(RetireArgs),
}

const LIST_EXAMPLES: &str = "\
Examples:
  turnctl keys list
  turnctl keys list -o wide        with what each relay has in force
  turnctl keys list -o json | jq -r '.keys[] | select(.state == \"retiring\") | .leaves_at'";
const ROTATE_EXAMPLES: &str = "\
Examples:
  turnctl keys rotate --wait                     every ring, and wait until all relays use the new keys
  turnctl keys rotate --ring nonce
  turnctl keys rotate --ring rest --secret-file - <new-secret
                                                 a TURN REST secret that your apps make credentials with

A new key is made known to every relay before anybody uses it. The old one stays accepted: nonce keys for
an hour, TURN REST secrets until the last credential made with them has expired (those given by --secret-file
until 'turnctl keys retire'), record keys until every record is sealed anew.";
const RETIRE_EXAMPLES: &str = "Examples:\n  turnctl keys retire rest 3";

/// Which rings, and by what.
#[derive(Args, Debug)]
pub(crate) struct RotateArgs {
    /// Ring to rotate
    #[arg(long, value_enum, default_value_t)]
    ring: Rings,
    /// File with the new TURN REST secret, - for standard input; with --ring rest
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Wait until every relay uses the new keys
    #[arg(long)]
    wait: bool,
}

/// Which key.
#[derive(Args, Debug)]
pub(crate) struct RetireArgs {
    /// Its ring
    #[arg(value_enum)]
    ring: RingName,
    /// Its number, as the list shows it
    id: u32,
}

/// Rings to rotate. The variants carry no help of their own: their names say it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum Rings {
    Rest,
    Nonce,
    Record,
    #[default]
    All,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum RingName {
    Rest,
    Nonce,
    Record,
}

impl From<RingName> for KeyRing {
    fn from(ring: RingName) -> Self {
        match ring {
            RingName::Rest => Self::Rest,
            RingName::Nonce => Self::Nonce,
            RingName::Record => Self::Record,
        }
    }
}

impl Rings {
    fn asked(self) -> Vec<i32> {
        match self {
            Self::Rest => vec![KeyRing::Rest.into()],
            Self::Nonce => vec![KeyRing::Nonce.into()],
            Self::Record => vec![KeyRing::Record.into()],
            Self::All => Vec::new(),
        }
    }
}

pub(crate) async fn run(args: &KeysArgs, connection: &ConnectionOptions, output: Output) -> Result {
    match &args.command {
        None | Some(KeysCommand::List) => {
            let cluster = connection.connect().await?;
            output.show(&KeysView::from(fetch(&cluster).await?))
        }
        Some(KeysCommand::Rotate(args)) => rotate(args, connection, output).await,
        Some(KeysCommand::Retire(args)) => retire(args, connection, output).await,
    }
}

async fn fetch(cluster: &Cluster) -> Result<ListKeysResponse> {
    let answer = AdminClient::new(cluster.channel.clone()).list_keys(ListKeysRequest {}).await;
    answer.map(tonic::Response::into_inner).map_err(|status| cluster.failure("list the keys", &status))
}

async fn rotate(args: &RotateArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let secret = args.secret_file.as_deref().map(read_secret).transpose()?.unwrap_or_default();
    if !secret.is_empty() && args.ring != Rings::Rest {
        return Err(Failure::usage("a secret is given for one ring").remedy("add --ring rest"));
    }
    let cluster = connection.connect().await?;
    let request = RotateKeysRequest { rings: args.ring.asked(), secret };
    let begun = AdminClient::new(cluster.channel.clone()).rotate_keys(request).await;
    let begun = begun.map_err(|status| cluster.failure("rotate the keys", &status))?.into_inner();
    if !begun.configured.is_empty() {
        output.note("the TURN REST secrets are in the controllers' configuration (rest_secrets): rotate them there");
    }
    if !args.wait {
        return output.show(&KeysView::of(begun.keys, begun.revision));
    }
    let wanted: Vec<_> = begun.keys.iter().map(|key| (key.ring, key.id)).collect();
    loop {
        match fetch(&cluster).await {
            Ok(now) => {
                let waits =
                    now.keys.iter().any(|key| wanted.contains(&(key.ring, key.id)) && key.state() == KeyState::Next);
                // A relay of the version before does not say what it has.
                let behind = now.relays.iter().any(|relay| (1..now.revision).contains(&relay.revision));
                if !waits && !behind {
                    return output.show(&KeysView::from(now));
                }
            }
            Err(failure) if failure.is_passing() => {}
            Err(failure) => return Err(failure),
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// A secret as a file has it; the newline that editors leave at its end is none of it.
fn read_secret(file: &Path) -> Result<Vec<u8>> {
    let mut secret = Vec::new();
    let read = if file == Path::new("-") {
        std::io::stdin().lock().read_to_end(&mut secret).map(drop)
    } else {
        std::fs::read(file).map(|bytes| secret = bytes)
    };
    read.map_err(|error| Failure::usage(format!("cannot read the secret {}: {error}", file.display())))?;
    if secret.last() == Some(&b'\n') {
        secret.pop();
        if secret.last() == Some(&b'\r') {
            secret.pop();
        }
    }
    if secret.is_empty() {
        return Err(Failure::usage(format!("{} holds no secret", file.display())));
    }
    Ok(secret)
}

async fn retire(args: &RetireArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    let ring = KeyRing::from(args.ring);
    let request = RetireKeyRequest { ring: ring.into(), id: args.id };
    let answer = AdminClient::new(cluster.channel.clone()).retire_key(request).await;
    let what = format!("retire key {} of the {} ring", args.id, ring_name(ring));
    answer.map_err(|status| cluster.failure(&what, &status))?;
    output.show_line(&RetiredView { ring: ring_name(ring), id: args.id, retired: true })
}

#[derive(Debug, Serialize)]
struct RetiredView {
    ring: &'static str,
    id: u32,
    retired: bool,
}

impl View for RetiredView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        vec![Block::Lines(vec![Cell::from(format!("key {} of the {} ring retired", self.id, self.ring))])]
    }
}

fn ring_name(ring: KeyRing) -> &'static str {
    match ring {
        KeyRing::Rest => "rest",
        KeyRing::Nonce => "nonce",
        KeyRing::Record => "record",
        KeyRing::Unspecified => "unknown",
    }
}

#[derive(Debug, Serialize)]
struct KeysView {
    keys: Vec<KeyView>,
    revision: u64,
    relays: Vec<RelayView>,
}

#[derive(Debug, Serialize)]
struct KeyView {
    ring: &'static str,
    id: u32,
    state: &'static str,
    origin: &'static str,
    created_at: Option<String>,
    since: Option<String>,
    leaves_at: Option<String>,
    #[serde(skip)]
    created_at_ms: u64,
    #[serde(skip)]
    since_ms: u64,
    #[serde(skip)]
    leaves_at_ms: u64,
}

#[derive(Debug, Serialize)]
struct RelayView {
    node_id: String,
    /// `None` if it does not say.
    revision: Option<u64>,
    current: bool,
}

impl From<Key> for KeyView {
    fn from(key: Key) -> Self {
        let state = match key.state() {
            KeyState::Next => "next",
            KeyState::Newest => "newest",
            KeyState::Accepted => "accepted",
            KeyState::Retiring => "retiring",
            KeyState::Unspecified => "unknown",
        };
        let origin = match key.origin() {
            KeyOrigin::Made => "made",
            KeyOrigin::Given => "given",
            KeyOrigin::Configured => "configured",
            KeyOrigin::Unspecified => "unknown",
        };
        Self {
            ring: ring_name(key.ring()),
            id: key.id,
            state,
            origin,
            created_at: units::timestamp(key.created_at),
            since: units::timestamp(key.since),
            leaves_at: units::timestamp(key.leaves_at),
            created_at_ms: key.created_at,
            since_ms: key.since,
            leaves_at_ms: key.leaves_at,
        }
    }
}

impl From<ListKeysResponse> for KeysView {
    fn from(list: ListKeysResponse) -> Self {
        let relay = |relay: turnpike_proto::v1::RelaySettings| RelayView {
            node_id: relay.node_id,
            revision: Some(relay.revision).filter(|revision| *revision > 0),
            current: relay.revision >= list.revision,
        };
        let relays = list.relays.into_iter().map(relay).collect();
        Self { relays, ..Self::of(list.keys, list.revision) }
    }
}

impl KeysView {
    fn of(keys: Vec<Key>, revision: u64) -> Self {
        Self { keys: keys.into_iter().map(KeyView::from).collect(), revision, relays: Vec::new() }
    }
}

impl View for KeysView {
    fn empty(&self) -> Option<&'static str> {
        self.keys.is_empty().then_some("no keys")
    }

    fn blocks(&self, wide: bool, now_ms: u64) -> Vec<Block> {
        let row = |key: &KeyView| {
            let tone = match key.state {
                "newest" => Tone::Good,
                "next" => Tone::Attention,
                _ => Tone::Plain,
            };
            let leaves = match (key.state, key.leaves_at_ms) {
                ("retiring", 0) => "when unused".into(),
                (_, 0) => "-".into(),
                (_, at) => match units::left(at, now_ms) {
                    left if left == "expired" => "now".into(),
                    left => format!("in {left}"),
                },
            };
            vec![
                Cell::from(key.ring),
                Cell::from(key.id.to_string()),
                Cell::toned(key.state, tone),
                Cell::from(key.origin),
                Cell::from(units::age(key.created_at_ms, now_ms)),
                Cell::from(units::age(key.since_ms, now_ms)),
                Cell::from(leaves),
            ]
        };
        let mut blocks = vec![Block::Table {
            head: vec!["RING", "KEY", "STATE", "ORIGIN", "AGE", "IN STATE", "LEAVES"],
            rows: self.keys.iter().map(row).collect(),
        }];
        if wide && !self.relays.is_empty() {
            let row = |relay: &RelayView| {
                let settings = match (relay.current, relay.revision) {
                    (true, _) => Cell::toned("current", Tone::Good),
                    (false, None) => Cell::from("does not say"),
                    (false, Some(_)) => Cell::toned("behind", Tone::Attention),
                };
                vec![Cell::from(&relay.node_id), settings]
            };
            blocks.push(Block::Table { head: vec!["RELAY", "SETTINGS"], rows: self.relays.iter().map(row).collect() });
        } else if !self.relays.is_empty() {
            let current = self.relays.iter().filter(|relay| relay.current).count();
            let line = format!("in force on {current} of {} relays", self.relays.len());
            let tone = if current == self.relays.len() { Tone::Good } else { Tone::Attention };
            blocks.push(Block::Lines(vec![Cell::toned(line, tone)]));
        }
        blocks
    }
}
