//! `turnctl events`: what happens in the cluster, as it happens.

use clap::Args;
use serde::Serialize;
use tokio_stream::StreamExt as _;
use turn_core::text;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{Event, EventKind, EventsRequest};

use crate::connection::ConnectionOptions;
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};
use crate::units;

/// Follow relays and allocations as they come and go, until Ctrl-C
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EventsArgs {
    /// Follow; it is what this command does anyway
    #[arg(short, long)]
    watch: bool,
    /// Only events of this relay
    #[arg(long)]
    node: Option<String>,
    /// Only events of this region
    #[arg(long)]
    region: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  turnctl events --watch
  turnctl events --node eu-1
  turnctl events -o json | jq 'select(.kind == \"node_left\")'";

pub(crate) async fn run(args: &EventsArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    let mut events = AdminClient::new(cluster.channel.clone())
        .events(EventsRequest {})
        .await
        .map_err(|status| cluster.failure("follow the events", &status))?
        .into_inner();
    output.note(&format!("following {}, Ctrl-C ends it", cluster.controller));
    let wanted = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
    while let Some(event) = events.next().await {
        let event = event.map_err(|status| cluster.failure("follow the events", &status))?;
        if wanted(&args.node, &event.node_id) && wanted(&args.region, &event.region) {
            output.show_line(&EventView::from(event))?;
        }
    }
    Err(Failure::new(Exit::Unreachable, format!("{} ended the stream", cluster.controller)).remedy("follow it again"))
}

#[derive(Debug, Serialize)]
struct EventView {
    at: Option<String>,
    kind: &'static str,
    node_id: String,
    region: String,
    /// Set for events of an allocation.
    allocation_id: Option<String>,
    /// Escaped: opaque bytes. Set for events of an allocation.
    username: Option<String>,
    detail: String,
    #[serde(skip)]
    at_ms: u64,
}

impl From<Event> for EventView {
    fn from(event: Event) -> Self {
        let kind = match event.kind() {
            EventKind::NodeJoined => "node_joined",
            EventKind::NodeLeft => "node_left",
            EventKind::NodeChanged => "node_changed",
            EventKind::AllocationCreated => "allocation_created",
            EventKind::AllocationEnded => "allocation_ended",
            EventKind::Unspecified => "unknown",
        };
        let of_allocation = !event.allocation_id.is_empty();
        Self {
            at: units::timestamp(event.at),
            kind,
            node_id: event.node_id,
            region: event.region,
            username: of_allocation.then(|| text::escape(&event.username)),
            allocation_id: of_allocation.then_some(event.allocation_id),
            detail: event.detail,
            at_ms: event.at,
        }
    }
}

impl View for EventView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let tone = match self.kind {
            "node_joined" => Tone::Good,
            "node_left" => Tone::Bad,
            "node_changed" => Tone::Attention,
            _ => Tone::Plain,
        };
        // The lines come one by one: fixed widths stand in for columns.
        let kind = Cell::toned(format!("{:<18}", self.kind.replace('_', " ")), tone);
        let node = format!("{:<12} {:<8}", self.node_id, self.region);
        let parts = [self.allocation_id.as_deref(), self.username.as_deref(), Some(self.detail.as_str())];
        let rest: Vec<_> = parts.into_iter().flatten().filter(|part| !part.is_empty()).collect();
        vec![Block::Table {
            head: Vec::new(),
            rows: vec![vec![
                Cell::from(units::clock(self.at_ms)),
                kind,
                Cell::from(node),
                Cell::toned(rest.join("  "), Tone::Plain),
            ]],
        }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Format, render};

    #[test]
    fn an_event_is_a_line_and_a_json_object() {
        let event = Event {
            at: 1_700_000_000_123,
            kind: EventKind::AllocationCreated as i32,
            node_id: "eu-1".into(),
            region: "eu".into(),
            allocation_id: "01HF8Z6Z3N3QW3V1R5Y0X2C4D6".into(),
            username: b"al\nice".to_vec(),
            detail: String::new(),
        };
        let view = EventView::from(event);
        assert_eq!(
            render(&view, Format::Table, false, 0).expect("renders"),
            "22:13:20.123Z   allocation created   eu-1         eu         01HF8Z6Z3N3QW3V1R5Y0X2C4D6  al\\x0aice\n"
        );
        assert_eq!(
            serde_json::to_value(&view).expect("JSON"),
            serde_json::json!({
                "at": "2023-11-14T22:13:20.123Z",
                "kind": "allocation_created",
                "node_id": "eu-1",
                "region": "eu",
                "allocation_id": "01HF8Z6Z3N3QW3V1R5Y0X2C4D6",
                "username": "al\\x0aice",
                "detail": "",
            })
        );
    }
}
