//! `turnctl top`: what each relay carries this second, as it changes.

mod board;
mod screen;

use std::io;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use ratatui::layout::Size;
use tokio::sync::mpsc;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{ListNodesRequest, Node};

use self::board::{Board, Sort};
use self::screen::{Command, Screen};
use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::{Failure, Result};
use crate::output::Output;
use crate::units;

/// How often relays are asked for: they report each second.
const PERIOD: Duration = Duration::from_secs(1);
/// Longest wait of `--once` for a second report, which a rate takes.
const SECOND_REPORT: Duration = Duration::from_secs(3);
/// How long the keyboard is waited for at a time, which bounds how long its thread outlives the command.
const KEYBOARD: Duration = Duration::from_millis(200);
/// Keys that may wait.
const KEYS: usize = 64;

/// Show what each relay carries, live: packets, traffic, allocations, processor, round trip, drain
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TopArgs {
    /// Only relays of this region
    #[arg(long, default_value = "", hide_default_value = true)]
    region: String,
    /// What relays are ordered by
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// One plain table and the end, as without a terminal; two reports are waited for
    #[arg(long)]
    once: bool,
}

impl TopArgs {
    /// Whether it goes on until somebody ends it.
    pub(crate) fn is_endless(&self) -> bool {
        !self.once && io::IsTerminal::is_terminal(&io::stdout())
    }
}

const EXAMPLES: &str = "\
Examples:
  turnctl top
  turnctl top --region eu --sort cpu
  turnctl top --once -o json | jq '.relays[] | {node_id, packets_per_second}'

Keys: n, p, t, a, c, r, d order by node, packets, traffic, allocations, cpu, round trip, drops; i turns the order
round; arrows, PgUp and PgDn scroll; q ends.
RTT is the longest round trip of a relay's backbone links.";

pub(crate) async fn run(args: &TopArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    if args.once || !output.is_terminal() || !output.format.is_table() {
        return once(args, &cluster, output).await;
    }
    live(args, connection, cluster, output).await
}

async fn fetch(cluster: &Cluster, region: &str) -> Result<Vec<Node>> {
    let answer = AdminClient::new(cluster.channel.clone())
        .list_nodes(ListNodesRequest { region: region.to_owned() })
        .await
        .map_err(|status| cluster.failure("list the nodes", &status))?;
    Ok(answer.into_inner().nodes)
}

/// Two reports of each relay that reports, and the rates between them.
async fn once(args: &TopArgs, cluster: &Cluster, output: Output) -> Result {
    let mut board = Board::default();
    board.update(fetch(cluster, &args.region).await?, units::now_ms());
    let started = Instant::now();
    while board.lacks_rates() && started.elapsed() < SECOND_REPORT {
        tokio::time::sleep(PERIOD / 4).await;
        board.update(fetch(cluster, &args.region).await?, units::now_ms());
    }
    output.show(&board.view(args.sort))
}

async fn live(args: &TopArgs, connection: &ConnectionOptions, mut cluster: Cluster, output: Output) -> Result {
    let mut board = Board::default();
    board.update(fetch(&cluster, &args.region).await?, units::now_ms());
    let mut terminal =
        ratatui::try_init().map_err(|error| Failure::failed(format!("cannot use the terminal: {error}")))?;
    // Whichever way this ends, also by Ctrl-C from elsewhere: the terminal is as it was.
    let _restored = Restored;
    let mut screen = Screen::new(cluster.controller.clone(), args.sort, output.is_coloured());
    let mut keys = keyboard();
    let mut ticks = tokio::time::interval_at((Instant::now() + PERIOD).into(), PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let unusable = |error: io::Error| Failure::failed(format!("cannot draw: {error}"));
    loop {
        terminal.draw(|frame| screen.draw(frame, &board)).map_err(unusable)?;
        tokio::select! {
            event = keys.recv() => match event {
                Some(Event::Key(key)) if key.kind != KeyEventKind::Release => {
                    let Size { height, .. } = terminal.size().map_err(unusable)?;
                    match screen.press(key, height, board.len()) {
                        Command::Quit => return Ok(()),
                        Command::Stay => {}
                    }
                }
                // A resize: drawn anew.
                Some(_) => {}
                None => return Ok(()),
            },
            _ = ticks.tick() => {
                let fetched = async {
                    if screen.problem.is_some() {
                        cluster = connection.connect().await?;
                    }
                    fetch(&cluster, &args.region).await
                };
                match fetched.await {
                    Ok(nodes) => {
                        screen.problem = None;
                        board.update(nodes, units::now_ms());
                    }
                    Err(failure) if failure.is_passing() => screen.problem = Some(failure.to_string()),
                    Err(failure) => return Err(failure),
                }
            }
        }
    }
}

/// What is typed, and resizes. The thread ends soon after the receiver is dropped.
fn keyboard() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(KEYS);
    std::thread::spawn(move || {
        while !sender.is_closed() {
            match event::poll(KEYBOARD) {
                Ok(false) => {}
                Ok(true) => match event::read() {
                    // What is typed faster than it is read is not wanted.
                    Ok(event) => drop(sender.try_send(event)),
                    Err(_) => return,
                },
                Err(_) => return,
            }
        }
    });
    receiver
}

/// Gives the terminal back.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        // Nothing is left to tell it to when this fails.
        let _ = ratatui::try_restore();
    }
}
