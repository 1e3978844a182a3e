//! `turnctl allocations`: who is being relayed.

use clap::{Args, Subcommand};
use serde::Serialize;
use turn_core::text;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{Allocation, GetAllocationRequest, ListAllocationsRequest, RevokeAllocationRequest};

use super::transport_name;
use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::Result;
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// The most a controller gives at once.
const PAGE: u32 = 1_000;

/// List, inspect and end allocations; lists them unless told otherwise
#[derive(Args, Debug)]
#[command(visible_alias = "alloc", args_conflicts_with_subcommands = true)]
pub(crate) struct AllocationsArgs {
    #[command(subcommand)]
    command: Option<AllocationsCommand>,
    #[command(flatten)]
    list: ListArgs,
}

#[derive(Debug, Subcommand)]
enum AllocationsCommand {
    /// List live allocations
    #[command(visible_alias = "ls", after_help = LIST_EXAMPLES)]
    List(ListArgs),
    /// Show one allocation with its permissions and channels
    #[command(after_help = GET_EXAMPLES)]
    Get(GetArgs),
    /// End allocations on their relays, at once (role operator)
    #[command(after_help = REVOKE_EXAMPLES)]
    Revoke(RevokeArgs),
}

const LIST_EXAMPLES: &str = "\
Examples:
  turnctl allocations list --node eu-1
  turnctl allocations list --user alice -o wide
  turnctl allocations list -o json | jq '.allocations | length'";
const GET_EXAMPLES: &str = "Examples:\n  turnctl allocations get 01HF8Z6Z3N3QW3V1R5Y0X2C4D6";
const REVOKE_EXAMPLES: &str = "\
Examples:
  turnctl allocations revoke 01HF8Z6Z3N3QW3V1R5Y0X2C4D6
  turnctl allocations list --user mallory -o json |
      jq -r '.allocations[].id' | xargs turnctl allocations revoke";

/// Which allocations.
#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    /// Only those of this relay
    #[arg(long, default_value = "", hide_default_value = true)]
    node: String,
    /// Only those of relays in this region
    #[arg(long, default_value = "", hide_default_value = true)]
    region: String,
    /// Only those of this user; bytes that do not print as \xNN, as shown
    #[arg(long, value_parser = user_name)]
    user: Option<UserName>,
    /// At most this many; 0 is all
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    limit: usize,
}

/// Which allocation.
#[derive(Args, Debug)]
pub(crate) struct GetArgs {
    /// Identifier, as the list shows it
    id: String,
}

/// Which allocations to end.
#[derive(Args, Debug)]
pub(crate) struct RevokeArgs {
    /// Identifiers, as the list shows them
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

/// A user name in bytes; a type of its own because clap takes a `Vec` for a list of values.
#[derive(Clone, Debug)]
pub(crate) struct UserName(pub(crate) Vec<u8>);

/// Reads a user name as `escape` shows it.
pub(crate) fn user_name(written: &str) -> std::result::Result<UserName, String> {
    text::unescape(written).map(UserName)
}

pub(crate) async fn run(args: &AllocationsArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    match &args.command {
        None => output.show(&list(&args.list, &cluster).await?),
        Some(AllocationsCommand::List(args)) => output.show(&list(args, &cluster).await?),
        Some(AllocationsCommand::Get(args)) => output.show(&get(args, &cluster).await?),
        Some(AllocationsCommand::Revoke(args)) => revoke(args, &cluster, output).await,
    }
}

async fn list(args: &ListArgs, cluster: &Cluster) -> Result<AllocationsView> {
    let mut admin = AdminClient::new(cluster.channel.clone());
    let mut view = AllocationsView { allocations: Vec::new() };
    let mut page_token = String::new();
    loop {
        let request = ListAllocationsRequest {
            node_id: args.node.clone(),
            region: args.region.clone(),
            user: args.user.as_ref().map(|user| user.0.clone()).unwrap_or_default(),
            page_size: PAGE,
            page_token,
        };
        let page = admin
            .list_allocations(request)
            .await
            .map_err(|status| cluster.failure("list the allocations", &status))?
            .into_inner();
        view.allocations.extend(page.allocations.into_iter().map(AllocationView::from));
        if args.limit > 0 && view.allocations.len() >= args.limit {
            view.allocations.truncate(args.limit);
            return Ok(view);
        }
        if page.next_page_token.is_empty() {
            return Ok(view);
        }
        page_token = page.next_page_token;
    }
}

async fn get(args: &GetArgs, cluster: &Cluster) -> Result<AllocationView> {
    AdminClient::new(cluster.channel.clone())
        .get_allocation(GetAllocationRequest { id: args.id.clone() })
        .await
        .map(|answer| answer.into_inner().into())
        .map_err(|status| cluster.failure(&format!("get the allocation {}", args.id), &status))
}

async fn revoke(args: &RevokeArgs, cluster: &Cluster, output: Output) -> Result {
    let mut admin = AdminClient::new(cluster.channel.clone());
    for id in &args.ids {
        admin
            .revoke_allocation(RevokeAllocationRequest { id: id.clone() })
            .await
            .map_err(|status| cluster.failure(&format!("revoke the allocation {id}"), &status))?;
        output.show_line(&RevokedView { id: id.clone(), revoked: true })?;
    }
    Ok(())
}

#[derive(Debug, Serialize)]
struct RevokedView {
    id: String,
    revoked: bool,
}

impl View for RevokedView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        vec![Block::Lines(vec![Cell::from(format!("allocation {} revoked", self.id))])]
    }
}

#[derive(Debug, Serialize)]
struct AllocationsView {
    allocations: Vec<AllocationView>,
}

#[derive(Debug, Serialize)]
struct AllocationView {
    id: String,
    node_id: String,
    region: String,
    relay_address: String,
    /// Escaped: opaque bytes.
    username: String,
    transport: &'static str,
    client: String,
    server: String,
    relayed: Vec<String>,
    permissions: Vec<PermissionView>,
    channels: Vec<ChannelView>,
    created_at: Option<String>,
    expires_at: Option<String>,
    epoch: u64,
    sequence: u64,
    #[serde(skip)]
    created_at_ms: u64,
    #[serde(skip)]
    expires_at_ms: u64,
}

#[derive(Debug, Serialize)]
struct PermissionView {
    peer_ip: String,
    expires_at: Option<String>,
    #[serde(skip)]
    expires_at_ms: u64,
}

#[derive(Debug, Serialize)]
struct ChannelView {
    number: u32,
    peer: String,
    expires_at: Option<String>,
    #[serde(skip)]
    expires_at_ms: u64,
}

impl From<Allocation> for AllocationView {
    fn from(allocation: Allocation) -> Self {
        let permissions = allocation.permissions.into_iter().map(|permission| PermissionView {
            peer_ip: permission.peer_ip,
            expires_at: units::timestamp(permission.expires_at),
            expires_at_ms: permission.expires_at,
        });
        let channels = allocation.channels.into_iter().map(|channel| ChannelView {
            number: channel.number,
            peer: channel.peer,
            expires_at: units::timestamp(channel.expires_at),
            expires_at_ms: channel.expires_at,
        });
        Self {
            id: allocation.id,
            node_id: allocation.node_id,
            region: allocation.region,
            relay_address: allocation.relay_address,
            username: text::escape(&allocation.username),
            transport: transport_name(allocation.transport),
            client: allocation.client,
            server: allocation.server,
            relayed: allocation.relayed,
            permissions: permissions.collect(),
            channels: channels.collect(),
            created_at: units::timestamp(allocation.created_at),
            expires_at: units::timestamp(allocation.expires_at),
            epoch: allocation.epoch,
            sequence: allocation.sequence,
            created_at_ms: allocation.created_at,
            expires_at_ms: allocation.expires_at,
        }
    }
}

impl View for AllocationsView {
    fn empty(&self) -> Option<&'static str> {
        self.allocations.is_empty().then_some("no allocations")
    }

    fn blocks(&self, wide: bool, now_ms: u64) -> Vec<Block> {
        let mut head = vec!["ID", "NODE", "USER", "CLIENT", "VIA", "RELAYED", "PEERS", "LEFT", "AGE"];
        if wide {
            head.extend(["REGION", "SERVER", "CHANNELS", "EPOCH", "SEQUENCE"]);
        }
        let row = |allocation: &AllocationView| {
            let mut row = vec![
                Cell::from(&allocation.id),
                Cell::from(&allocation.node_id),
                Cell::from(&allocation.username),
                Cell::from(&allocation.client),
                Cell::from(allocation.transport),
                Cell::from(allocation.relayed.join(",")),
                Cell::from(allocation.permissions.len().to_string()),
                Cell::from(units::left(allocation.expires_at_ms, now_ms)),
                Cell::from(units::age(allocation.created_at_ms, now_ms)),
            ];
            if wide {
                row.extend([
                    Cell::from(&allocation.region),
                    Cell::from(&allocation.server),
                    Cell::from(allocation.channels.len().to_string()),
                    Cell::from(allocation.epoch.to_string()),
                    Cell::from(allocation.sequence.to_string()),
                ]);
            }
            row
        };
        vec![Block::Table { head, rows: self.allocations.iter().map(row).collect() }]
    }
}

impl View for AllocationView {
    fn blocks(&self, _wide: bool, now_ms: u64) -> Vec<Block> {
        let expires = match units::left(self.expires_at_ms, now_ms) {
            left if left == "expired" => Cell::toned(left, Tone::Attention),
            left => Cell::from(format!("in {left}")),
        };
        let mut blocks = vec![Block::Fields(vec![
            ("Id", Cell::from(&self.id)),
            ("Node", Cell::from(format!("{} ({})", self.node_id, self.region))),
            ("User", Cell::from(&self.username)),
            ("Client", Cell::from(format!("{} over {} to {}", self.client, self.transport, self.server))),
            ("Relayed", Cell::from(self.relayed.join(", "))),
            ("Created", Cell::from(format!("{} ago", units::age(self.created_at_ms, now_ms)))),
            ("Expires", expires),
            ("Record", Cell::from(format!("epoch {}, sequence {}", self.epoch, self.sequence))),
        ])];
        if !self.permissions.is_empty() {
            let row =
                |it: &PermissionView| vec![Cell::from(&it.peer_ip), Cell::from(units::left(it.expires_at_ms, now_ms))];
            let rows = self.permissions.iter().map(row).collect();
            blocks.push(Block::Table { head: vec!["PERMISSION", "LEFT"], rows });
        }
        if !self.channels.is_empty() {
            let row = |it: &ChannelView| {
                let left = units::left(it.expires_at_ms, now_ms);
                vec![Cell::from(format!("{:#06x}", it.number)), Cell::from(&it.peer), Cell::from(left)]
            };
            let rows = self.channels.iter().map(row).collect();
            blocks.push(Block::Table { head: vec!["CHANNEL", "PEER", "LEFT"], rows });
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use turnpike_proto::v1::{Channel, Permission, Transport};

    use super::*;
    use crate::output::{Format, render};

    const NOW: u64 = 1_700_000_100_000;

    fn allocation() -> AllocationView {
        let record = Allocation {
            id: "01HF8Z6Z3N3QW3V1R5Y0X2C4D6".into(),
            node_id: "eu-1".into(),
            region: "eu".into(),
            relay_address: "192.0.2.1".into(),
            username: b"1700003600:al\x1bice".to_vec(),
            client: "198.51.100.9:40000".into(),
            server: "192.0.2.1:3478".into(),
            transport: Transport::Udp as i32,
            relayed: vec!["192.0.2.1:50000".into()],
            permissions: vec![Permission { peer_ip: "203.0.113.5".into(), expires_at: NOW + 240_000 }],
            channels: vec![Channel { number: 0x4000, peer: "203.0.113.5:5000".into(), expires_at: NOW + 540_000 }],
            created_at: NOW - 75_000,
            expires_at: NOW + 525_000,
            epoch: 3,
            sequence: 17,
        };
        record.into()
    }

    #[test]
    fn the_table_is_one_line_an_allocation() {
        let view = AllocationsView { allocations: vec![allocation()] };
        let expected = "\
ID                           NODE   USER                   CLIENT               VIA   RELAYED           PEERS   LEFT    AGE
01HF8Z6Z3N3QW3V1R5Y0X2C4D6   eu-1   1700003600:al\\x1bice   198.51.100.9:40000   udp   192.0.2.1:50000   1       8m45s   1m15s
";
        assert_eq!(render(&view, Format::Table, false, NOW).expect("renders"), expected);
    }

    #[test]
    fn one_allocation_shows_its_peers() {
        let expected = "\
Id        01HF8Z6Z3N3QW3V1R5Y0X2C4D6
Node      eu-1 (eu)
User      1700003600:al\\x1bice
Client    198.51.100.9:40000 over udp to 192.0.2.1:3478
Relayed   192.0.2.1:50000
Created   1m15s ago
Expires   in 8m45s
Record    epoch 3, sequence 17

PERMISSION    LEFT
203.0.113.5   4m

CHANNEL   PEER               LEFT
0x4000    203.0.113.5:5000   9m
";
        assert_eq!(render(&allocation(), Format::Table, false, NOW).expect("renders"), expected);
    }

    #[test]
    fn the_keys_of_json_stay() {
        let expected = serde_json::json!({
            "id": "01HF8Z6Z3N3QW3V1R5Y0X2C4D6",
            "node_id": "eu-1",
            "region": "eu",
            "relay_address": "192.0.2.1",
            "username": "1700003600:al\\x1bice",
            "transport": "udp",
            "client": "198.51.100.9:40000",
            "server": "192.0.2.1:3478",
            "relayed": ["192.0.2.1:50000"],
            "permissions": [{"peer_ip": "203.0.113.5", "expires_at": "2023-11-14T22:19:00Z"}],
            "channels": [{"number": 0x4000, "peer": "203.0.113.5:5000", "expires_at": "2023-11-14T22:24:00Z"}],
            "created_at": "2023-11-14T22:13:45Z",
            "expires_at": "2023-11-14T22:23:45Z",
            "epoch": 3,
            "sequence": 17,
        });
        let shown = render(&allocation(), Format::Json, true, NOW).expect("renders");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("JSON"), expected);
    }
}
