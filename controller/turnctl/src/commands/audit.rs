//! `turnctl audit`: who changed what.

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{AuditAction, AuditOutcome, ListAuditRequest};

use crate::connection::ConnectionOptions;
use crate::failure::Result;
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// Show who changed what lately, done or only tried: drains, keys, revocations
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AuditArgs {
    /// At most this many, newest first
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

const EXAMPLES: &str = "\
Examples:
  turnctl audit
  turnctl audit -o json | jq '.actions[] | select(.outcome == \"denied\")'

Each controller keeps its last 100; the whole record is in their logs (target audit).";

pub(crate) async fn run(args: &AuditArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    let answer = AdminClient::new(cluster.channel.clone())
        .list_audit(ListAuditRequest { limit: args.limit })
        .await
        .map_err(|status| cluster.failure("read the audit log", &status))?;
    output.show(&AuditView { actions: answer.into_inner().actions.into_iter().map(ActionView::from).collect() })
}

#[derive(Debug, Serialize)]
struct AuditView {
    actions: Vec<ActionView>,
}

#[derive(Debug, Serialize)]
struct ActionView {
    at: Option<String>,
    caller: String,
    action: String,
    on: String,
    outcome: &'static str,
    detail: String,
    via: String,
    controller: String,
}

impl From<AuditAction> for ActionView {
    fn from(action: AuditAction) -> Self {
        let outcome = match action.outcome() {
            AuditOutcome::Done => "done",
            AuditOutcome::Denied => "denied",
            AuditOutcome::Failed => "failed",
            AuditOutcome::Unknown | AuditOutcome::Unspecified => "unknown",
        };
        Self {
            at: units::timestamp(action.at),
            caller: action.caller,
            action: action.action,
            on: action.on,
            outcome,
            detail: action.detail,
            via: action.via,
            controller: action.controller,
        }
    }
}

impl View for AuditView {
    fn empty(&self) -> Option<&'static str> {
        self.actions.is_empty().then_some("nobody has changed anything yet")
    }

    fn blocks(&self, wide: bool, _now_ms: u64) -> Vec<Block> {
        let mut head = vec!["AT", "WHO", "WHAT", "ON", "OUTCOME", "DETAIL"];
        if wide {
            head.extend(["VIA", "CONTROLLER"]);
        }
        let row = |action: &ActionView| {
            let tone = match action.outcome {
                "done" => Tone::Good,
                "denied" => Tone::Bad,
                _ => Tone::Attention,
            };
            let mut row = vec![
                Cell::from(action.at.as_deref().unwrap_or_default()),
                Cell::from(&action.caller),
                Cell::from(&action.action),
                Cell::from(&action.on),
                Cell::toned(action.outcome, tone),
                Cell::from(&action.detail),
            ];
            if wide {
                row.extend([Cell::from(&action.via), Cell::from(&action.controller)]);
            }
            row
        };
        vec![Block::Table { head, rows: self.actions.iter().map(row).collect() }]
    }
}
