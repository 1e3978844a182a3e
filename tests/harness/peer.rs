//! A call between two Chromium pages, relayed candidates only; the harness is their signalling.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::chromium::{Browser, Page, Surroundings};
use crate::process::Host;
use crate::wait::eventually;

const PAGE: &str = include_str!("peer.html");

/// What `RTCPeerConnection` takes as `iceServers`.
pub type IceServers = Value;

/// One end of a call.
pub struct Peer {
    // Dropped after the page.
    page: Page,
    browser: Browser,
}

/// What an end has seen so far.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Video frames decoded.
    pub frames_decoded: u64,
    /// Video packets received.
    pub packets_received: u64,
    /// Video packets lost, by RTCP's account.
    pub packets_lost: i64,
    /// Id of the selected candidate pair.
    pub pair: Option<String>,
    /// Type of its local candidate.
    pub local: Option<String>,
    /// Type of its remote candidate.
    pub remote: Option<String>,
    /// `udp`, `tcp` or `tls`: how this end talks to its relay.
    pub relay_protocol: Option<String>,
    /// Address of the remote candidate.
    pub remote_address: Option<String>,
    /// This end's relayed address.
    pub relayed: Option<String>,
    /// Milliseconds.
    pub round_trip_ms: f64,
    /// Connection state now.
    pub state: String,
    /// Every connection state, with the time it began.
    pub states: Vec<State>,
    /// ICE candidate errors.
    pub errors: Vec<String>,
    /// When the offer was asked for, Unix milliseconds.
    pub began: Option<f64>,
}

/// A connection state.
#[derive(Clone, Debug, Deserialize)]
pub struct State {
    /// Unix milliseconds.
    pub at: f64,
    /// Its name.
    pub state: String,
}

impl Peer {
    /// Starts a browser with the page of one end on `host`.
    ///
    /// # Errors
    /// Chromium does not start.
    pub async fn start(host: &Host, directory: &Path, name: &str) -> Result<Self> {
        Self::start_with(host, directory, name, &Surroundings::default()).await
    }

    /// The same, with the browser in these surroundings.
    ///
    /// # Errors
    /// Chromium does not start.
    pub async fn start_with(host: &Host, directory: &Path, name: &str, around: &Surroundings) -> Result<Self> {
        // A file is a secure context, which the camera needs; a page from http://<public address> is none.
        let file = directory.join("peer.html");
        std::fs::write(&file, PAGE)?;
        let browser = Browser::launch_with(host, directory, name, around).await?;
        let page = browser.open(&format!("file://{}", file.display())).await?;
        Ok(Self { page, browser })
    }

    /// The browser.
    #[must_use]
    pub fn browser(&self) -> &Browser {
        &self.browser
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// What it has seen so far.
    ///
    /// # Errors
    /// No call was begun.
    pub async fn report(&self) -> Result<Report> {
        self.page.evaluate("report()").await
    }

    /// Waits until this many more video frames have been decoded.
    ///
    /// # Errors
    /// They were not within `limit`.
    pub async fn decodes(&self, frames: u64, limit: Duration) -> Result<Report> {
        let before = self.report().await?.frames_decoded;
        let what = format!("{frames} more frames decoded");
        let (report, _) = eventually(&what, limit, async || {
            let report = self.report().await?;
            if report.frames_decoded >= before + frames { Ok(report) } else { Err(anyhow!("{report:?}")) }
        })
        .await?;
        Ok(report)
    }

    /// Begins to watch for silence.
    ///
    /// # Errors
    /// No call was begun.
    pub async fn watch_silence(&self) -> Result<()> {
        self.page.evaluate::<Value>("watch()").await.map(drop)
    }

    /// Longest silence since then, to 50 ms.
    ///
    /// # Errors
    /// Nobody watched.
    pub async fn longest_silence(&self) -> Result<Duration> {
        Ok(Duration::from_secs_f64(self.page.evaluate::<f64>("silence()").await? / 1000.0))
    }

    /// Makes an offer with all its candidates, for an end that is no page.
    ///
    /// # Errors
    /// No candidates were gathered.
    pub async fn offer(&mut self, servers: &IceServers) -> Result<String> {
        self.begin(servers).await?;
        self.page.evaluate("wholeOffer()").await
    }

    /// Takes the answer to it and waits until both are connected.
    ///
    /// # Errors
    /// They were not within `limit`.
    pub async fn answered(&self, sdp: &str, limit: Duration) -> Result<()> {
        let description = json!({"type": "answer", "sdp": sdp});
        self.page.evaluate::<bool>(&format!("described({description})")).await?;
        eventually("connected", limit, async || {
            let report = self.report().await?;
            if report.state == "connected" { Ok(()) } else { Err(anyhow!("{report:?}")) }
        })
        .await?;
        Ok(())
    }

    async fn begin(&mut self, servers: &IceServers) -> Result<()> {
        // What the call before had to say is of no use to this one.
        while self.page.has_told() {
            self.page.told().await;
        }
        self.page.evaluate::<Value>(&format!("begin({servers})")).await.map(drop)
    }
}

/// Connects a caller with a callee; answers how long it took from the offer until both ends were connected.
///
/// # Errors
/// An end failed, or both were not connected within `limit`.
pub async fn connect(
    (caller, servers_of_caller): (&mut Peer, &IceServers),
    (callee, servers_of_callee): (&mut Peer, &IceServers),
    limit: Duration,
) -> Result<Duration> {
    caller.begin(servers_of_caller).await?;
    callee.begin(servers_of_callee).await?;
    let connecting = async {
        let offer: String = caller.page.evaluate("offer()").await?;
        let answer: String = callee.page.evaluate(&format!("answer({})", json!(offer))).await?;
        let description = json!({"type": "answer", "sdp": answer});
        caller.page.evaluate::<bool>(&format!("described({description})")).await?;
        let (mut caller_up, mut callee_up) = (false, false);
        while !(caller_up && callee_up) {
            let (message, from_caller) = tokio::select! {
                message = caller.page.told() => (message, true),
                message = callee.page.told() => (message, false),
            };
            let message: Value = serde_json::from_str(&message.context("Chromium has ended")?)?;
            if let Some(candidate) = message.get("candidate") {
                let other = if from_caller { &callee.page } else { &caller.page };
                other.evaluate::<bool>(&format!("candidate({candidate})")).await?;
            }
            match message["state"].as_str() {
                Some("connected") if from_caller => caller_up = true,
                Some("connected") => callee_up = true,
                Some("failed") => bail!("an end failed to connect"),
                _ => {}
            }
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(limit, connecting).await {
        Ok(outcome) => outcome?,
        Err(_) => bail!(
            "not connected within {limit:?}: caller {:?}, callee {:?}",
            caller.report().await?,
            callee.report().await?
        ),
    }
    let (caller, callee) = (caller.report().await?, callee.report().await?);
    let connected = |r: &Report| r.states.iter().find(|s| s.state == "connected").map(|s| s.at);
    let began = caller.began.context("no offer was made")?;
    let last = connected(&caller).zip(connected(&callee)).map(|(a, b)| a.max(b)).context("not connected")?;
    Ok(Duration::from_secs_f64((last - began) / 1000.0))
}
