//! `turnctl usage`: what allocations, and users, have used.

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;
use turn_core::text;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{AllocationUsage, EndReason, ListUsageRequest};

use super::allocations::{UserName, user_name};
use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::Result;
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// The most a controller gives at once.
const PAGE: u32 = 1_000;

/// What allocations have used: those that have ended, and those that live as of their last checkpoint
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct UsageArgs {
    /// Only this allocation; its identifier, as the list shows it
    #[arg(value_name = "ID", default_value = "", hide_default_value = true)]
    id: String,
    /// Only what this user has used: the whole name, or the part behind the time of a credential
    #[arg(long, value_parser = user_name)]
    user: Option<UserName>,
    /// Sum up by user; credentials of one user count together
    #[arg(long)]
    by_user: bool,
    /// At most this many allocations; 0 is all
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    limit: usize,
}

const EXAMPLES: &str = "\
Examples:
  turnctl usage --user alice
  turnctl usage --by-user
  turnctl usage -o json | jq '[.usage[].bytes_to_peer] | add'";

pub(crate) async fn run(args: &UsageArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    let usage = fetch(args, &cluster).await?;
    if args.by_user {
        output.show(&by_user(usage))
    } else {
        output.show(&UsageView { usage: usage.into_iter().map(Line::from).collect() })
    }
}

async fn fetch(args: &UsageArgs, cluster: &Cluster) -> Result<Vec<AllocationUsage>> {
    let mut admin = AdminClient::new(cluster.channel.clone());
    let mut usage = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListUsageRequest {
            user: args.user.as_ref().map(|user| user.0.clone()).unwrap_or_default(),
            id: args.id.clone(),
            page_size: PAGE,
            page_token,
        };
        let page = admin.list_usage(request).await.map_err(|status| cluster.failure("list the usage", &status))?;
        let page = page.into_inner();
        usage.extend(page.usage);
        if args.limit > 0 && usage.len() >= args.limit {
            usage.truncate(args.limit);
            return Ok(usage);
        }
        if page.next_page_token.is_empty() {
            return Ok(usage);
        }
        page_token = page.next_page_token;
    }
}

/// The part of a name that stays when its credential is renewed.
fn person(username: &[u8]) -> String {
    text::escape(turn_core::credential::quota_key(username))
}

fn by_user(usage: Vec<AllocationUsage>) -> UsersView {
    let mut users: BTreeMap<String, User> = BTreeMap::new();
    for one in usage {
        let username = person(&one.username);
        let user = users.entry(username.clone()).or_insert(User { username, ..User::default() });
        user.allocations += 1;
        user.live += u64::from(one.ended_at == 0);
        user.packets_to_peer += one.packets_to_peer;
        user.bytes_to_peer += one.bytes_to_peer;
        user.packets_to_client += one.packets_to_client;
        user.bytes_to_client += one.bytes_to_client;
        user.unclean += u64::from(one.unclean);
    }
    UsersView { users: users.into_values().collect() }
}

#[derive(Debug, Serialize)]
struct UsageView {
    usage: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct Line {
    id: String,
    /// Escaped: opaque bytes.
    username: String,
    node_id: String,
    relay_address: String,
    started_at: Option<String>,
    /// Nothing while it lives.
    ended_at: Option<String>,
    /// `live`, `deleted`, `expired`, `closed`, `revoked` or `unknown`.
    state: &'static str,
    packets_to_peer: u64,
    bytes_to_peer: u64,
    packets_to_client: u64,
    bytes_to_client: u64,
    /// Some of it may be missing.
    unclean: bool,
    /// Of the last checkpoint.
    counted_at: Option<String>,
    #[serde(skip)]
    started_at_ms: u64,
    #[serde(skip)]
    ended_at_ms: u64,
}

impl From<AllocationUsage> for Line {
    fn from(usage: AllocationUsage) -> Self {
        Self {
            state: state(&usage),
            id: usage.id,
            username: text::escape(&usage.username),
            node_id: usage.node_id,
            relay_address: usage.relay_address,
            started_at: units::timestamp(usage.started_at),
            ended_at: Some(usage.ended_at).filter(|at| *at != 0).and_then(units::timestamp),
            packets_to_peer: usage.packets_to_peer,
            bytes_to_peer: usage.bytes_to_peer,
            packets_to_client: usage.packets_to_client,
            bytes_to_client: usage.bytes_to_client,
            unclean: usage.unclean,
            counted_at: Some(usage.counted_at).filter(|at| *at != 0).and_then(units::timestamp),
            started_at_ms: usage.started_at,
            ended_at_ms: usage.ended_at,
        }
    }
}

fn state(usage: &AllocationUsage) -> &'static str {
    match usage.reason() {
        _ if usage.ended_at == 0 => "live",
        EndReason::Deleted => "deleted",
        EndReason::Expired => "expired",
        EndReason::Closed => "closed",
        EndReason::Revoked => "revoked",
        EndReason::Unspecified => "unknown",
    }
}

#[derive(Debug, Serialize)]
struct UsersView {
    users: Vec<User>,
}

#[derive(Debug, Default, Serialize)]
struct User {
    /// Escaped: opaque bytes.
    username: String,
    allocations: u64,
    live: u64,
    packets_to_peer: u64,
    bytes_to_peer: u64,
    packets_to_client: u64,
    bytes_to_client: u64,
    /// Allocations of which some use may be missing.
    unclean: u64,
}

fn count(bytes: u64, packets: u64) -> String {
    format!("{} ({packets})", units::bytes(bytes))
}

impl View for UsageView {
    fn empty(&self) -> Option<&'static str> {
        self.usage.is_empty().then_some("no usage")
    }

    fn blocks(&self, wide: bool, now_ms: u64) -> Vec<Block> {
        let mut head = vec!["ID", "USER", "STATE", "TO PEER", "TO CLIENT", "LASTED"];
        if wide {
            head.extend(["NODE", "ADDRESS", "STARTED", "ENDED"]);
        }
        let row = |line: &Line| {
            let end = if line.ended_at_ms == 0 { now_ms } else { line.ended_at_ms };
            let state = if line.unclean {
                Cell::toned(format!("{}, unclean", line.state), Tone::Attention)
            } else {
                Cell::from(line.state)
            };
            let mut row = vec![
                Cell::from(&line.id),
                Cell::from(&line.username),
                state,
                Cell::from(count(line.bytes_to_peer, line.packets_to_peer)),
                Cell::from(count(line.bytes_to_client, line.packets_to_client)),
                Cell::from(units::age(line.started_at_ms, end)),
            ];
            if wide {
                row.extend([
                    Cell::from(&line.node_id),
                    Cell::from(&line.relay_address),
                    Cell::from(line.started_at.as_deref().unwrap_or_default()),
                    Cell::from(line.ended_at.as_deref().unwrap_or_default()),
                ]);
            }
            row
        };
        vec![Block::Table { head, rows: self.usage.iter().map(row).collect() }]
    }
}

impl View for UsersView {
    fn empty(&self) -> Option<&'static str> {
        self.users.is_empty().then_some("no usage")
    }

    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let head = vec!["USER", "ALLOCATIONS", "LIVE", "TO PEER", "TO CLIENT", "UNCLEAN"];
        let row = |user: &User| {
            vec![
                Cell::from(&user.username),
                Cell::from(user.allocations.to_string()),
                Cell::from(user.live.to_string()),
                Cell::from(count(user.bytes_to_peer, user.packets_to_peer)),
                Cell::from(count(user.bytes_to_client, user.packets_to_client)),
                Cell::from(user.unclean.to_string()),
            ]
        };
        vec![Block::Table { head, rows: self.users.iter().map(row).collect() }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Format, render};

    const NOW: u64 = 1_700_000_100_000;

    fn usage(username: &[u8], ended_at: u64, unclean: bool) -> AllocationUsage {
        AllocationUsage {
            id: "01HF8Z6Z3N3QW3V1R5Y0X2C4D6".into(),
            username: username.into(),
            node_id: "eu-1".into(),
            relay_address: "192.0.2.1".into(),
            started_at: NOW - 75_000,
            ended_at,
            reason: EndReason::Deleted as i32,
            packets_to_peer: 3,
            bytes_to_peer: 300,
            packets_to_client: 2,
            bytes_to_client: 2000,
            unclean,
            counted_at: NOW - 10_000,
        }
    }

    #[test]
    fn the_keys_of_json_stay() {
        let view = UsageView { usage: vec![usage(b"1700003600:al\x1bice", NOW - 15_000, false).into()] };
        let expected = serde_json::json!({"usage": [{
            "id": "01HF8Z6Z3N3QW3V1R5Y0X2C4D6",
            "username": "1700003600:al\\x1bice",
            "node_id": "eu-1",
            "relay_address": "192.0.2.1",
            "started_at": "2023-11-14T22:13:45Z",
            "ended_at": "2023-11-14T22:14:45Z",
            "state": "deleted",
            "packets_to_peer": 3,
            "bytes_to_peer": 300,
            "packets_to_client": 2,
            "bytes_to_client": 2000,
            "unclean": false,
            "counted_at": "2023-11-14T22:14:50Z",
        }]});
        let shown = render(&view, Format::Json, true, NOW).expect("renders");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("JSON"), expected);
    }

    #[test]
    fn credentials_of_a_user_count_together() {
        let view = by_user(vec![
            usage(b"1700003600:alice", NOW, false),
            usage(b"1700007200:alice", 0, false),
            usage(b"bob", NOW, true),
        ]);
        let summed: Vec<_> =
            view.users.iter().map(|u| (u.username.as_str(), u.allocations, u.live, u.unclean)).collect();
        assert_eq!(summed, [("alice", 2, 1, 0), ("bob", 1, 0, 1)]);
        assert_eq!((view.users[0].bytes_to_peer, view.users[0].packets_to_client), (600, 4));
    }

    #[test]
    fn the_table_says_what_may_be_missing() {
        let view = UsageView { usage: vec![usage(b"bob", NOW, true).into(), usage(b"eve", 0, false).into()] };
        let shown = render(&view, Format::Table, false, NOW).expect("renders");
        assert!(shown.contains("deleted, unclean") && shown.contains("live"), "{shown}");
        assert!(shown.contains("1m15s"), "{shown}");
    }
}
