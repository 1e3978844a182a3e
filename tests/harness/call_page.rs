//! The call page of the local cluster, served on a host of a test, and calls held on it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use turnpike_local::page::{self, Upstream};

use crate::chromium::{Browser, Page};
use crate::place::Place;
use crate::wait::eventually;

/// Its port.
pub const PORT: u16 = 8000;

/// Serves it on `host` at `at` before the controller at this address, until the host's runtime ends.
///
/// # Errors
/// The address is taken.
pub async fn serve(place: &Place, controller: SocketAddr) -> Result<String> {
    let at = place.at(PORT);
    place
        .host
        .run(async move {
            let client = turnpike_local::ready::client()?;
            let upstream = Upstream { client, base: format!("http://{controller}"), ca: "none".into() };
            tokio::spawn(page::serve(at, None, page::router(upstream))?);
            Ok(())
        })
        .await?;
    Ok(format!("http://{at}/"))
}

/// One end of a call on the page.
pub struct CallPage {
    /// For all else.
    pub page: Page,
}

/// What the page's keeper has said.
#[derive(Clone, Debug, Deserialize)]
pub struct Notice {
    /// As in `turnpike.js`.
    #[serde(rename = "type")]
    pub what: String,
    /// Of a restart.
    pub reason: Option<String>,
    /// Of an event.
    pub kind: Option<String>,
    /// The node it is about.
    pub relay: Option<String>,
}

/// What may not change while a relay restarts.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct Course {
    /// Every state of the page so far.
    pub states: Vec<String>,
    /// Id of the chosen pair.
    pub pair: String,
    /// ICE user name fragment, which is new with every ICE restart.
    pub ufrag: String,
}

impl CallPage {
    /// Opens the page and joins; `query` says how.
    ///
    /// # Errors
    /// The page does not load.
    pub async fn join(browser: &Browser, url: &str, query: &str) -> Result<Self> {
        Ok(Self { page: browser.open(&format!("{url}?auto=1&fake=1&{query}")).await? })
    }

    /// Waits until it is connected and pictures come.
    ///
    /// # Errors
    /// They do not within `limit`.
    pub async fn is_connected(&self, limit: Duration) -> Result<()> {
        self.page.wait_for("turnpike.state === 'connected' && turnpike.relays.length === 2", limit).await?;
        self.gets_pictures(limit).await
    }

    /// Waits until more pictures have come.
    ///
    /// # Errors
    /// They do not within `limit`.
    pub async fn gets_pictures(&self, limit: Duration) -> Result<()> {
        let before: u64 = self.page.evaluate("turnpike.framesDecoded").await?;
        self.page.wait_for(&format!("turnpike.framesDecoded >= {before} + 20"), limit).await
    }

    /// Waits until both ends of its call are on this node.
    ///
    /// # Errors
    /// They are not within `limit`.
    pub async fn is_on(&self, node: &str, limit: Duration) -> Result<()> {
        let (_, _) = eventually(&format!("the call is on {node}"), limit, async || {
            let nodes: Vec<String> = self.page.evaluate("turnpike.relays").await?;
            ensure!(nodes.len() == 2 && nodes.iter().all(|at| at == node), "{nodes:?}, {:?}", self.notices().await?);
            Ok(())
        })
        .await?;
        Ok(())
    }

    /// What the keeper has said so far.
    ///
    /// # Errors
    /// The page is gone.
    pub async fn notices(&self) -> Result<Vec<Notice>> {
        self.page.evaluate("turnpike.notices").await
    }

    /// Why ICE was restarted so far.
    ///
    /// # Errors
    /// The page is gone.
    pub async fn restarts(&self) -> Result<Vec<String>> {
        Ok(self.notices().await?.into_iter().filter_map(|notice| notice.reason).collect())
    }

    /// Waits until the keeper was told this of a relay.
    ///
    /// # Errors
    /// It was not within `limit`.
    pub async fn hears(&self, kind: &str, node: &str, limit: Duration) -> Result<()> {
        self.page
            .wait_for(&format!("turnpike.notices.some((n) => n.kind === {kind:?} && n.relay === {node:?})"), limit)
            .await
    }

    /// What may not change while a relay restarts.
    ///
    /// # Errors
    /// There is no call.
    pub async fn course(&self) -> Result<Course> {
        self.page
            .evaluate(
                "({ states: turnpike.history.map(({ state }) => state), pair: turnpike.pair.id, \
                 ufrag: /a=ice-ufrag:(.*)/.exec(turnpike.pc.localDescription.sdp)[1] })",
            )
            .await
    }

    /// Forgets the longest pause so far.
    ///
    /// # Errors
    /// The page is gone.
    pub async fn forget_pauses(&self) -> Result<()> {
        self.page.evaluate::<Value>("turnpike.longestPauseMs = 0").await.map(drop)
    }

    /// Longest time without a picture since then, to 100 ms.
    ///
    /// # Errors
    /// The page is gone.
    pub async fn longest_pause(&self) -> Result<Duration> {
        Ok(Duration::from_millis(self.page.evaluate::<u64>("turnpike.longestPauseMs").await?))
    }

    /// Waits until the first credentials have expired and others are in place.
    ///
    /// # Errors
    /// They did not within `limit`.
    pub async fn outlives_its_credentials(&self, limit: Duration) -> Result<Duration> {
        let began = Instant::now();
        let first: String = self.page.evaluate("turnpike.iceServers[0].username").await?;
        let expires: u64 = first.split(':').next().context("no expiry")?.parse()?;
        self.page.wait_for(&format!("Date.now() / 1000 > {expires}"), limit).await?;
        let now: String = self.page.evaluate("turnpike.pc.getConfiguration().iceServers[0].username").await?;
        let left: f64 = self
            .page
            .evaluate("+turnpike.pc.getConfiguration().iceServers[0].username.split(':')[0] - Date.now() / 1000")
            .await?;
        ensure!(now != first && left > 0.0, "the connection still has {now}, {left} s before its end");
        Ok(began.elapsed())
    }
}

/// Both ends of a call, each in its browser.
///
/// # Errors
/// They do not connect within `limit`.
pub async fn call(browsers: [&Browser; 2], url: &str, query: &str, limit: Duration) -> Result<[CallPage; 2]> {
    let ends = [CallPage::join(browsers[0], url, query).await?, CallPage::join(browsers[1], url, query).await?];
    for end in &ends {
        end.is_connected(limit).await?;
    }
    Ok(ends)
}
