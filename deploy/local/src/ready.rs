//! Waiting until every process serves, and the questions asked of a cluster that does.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::plan::{Plan, RelayPlan};

/// Between two questions; they go to loopback and cost next to nothing.
const PAUSE: Duration = Duration::from_millis(25);
/// No answer on loopback takes longer.
const ANSWER: Duration = Duration::from_secs(2);
/// Lines of a log that are shown when its process fails.
const LOG_LINES: usize = 12;
/// How much of the end of a log is looked at for them.
const LOG_TAIL: u64 = 16 * 1024;

/// Something that says at a URL whether it is ready.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Check {
    /// The member, as the supervisor names it.
    pub member: String,
    /// 200 is ready.
    pub url: String,
    /// The answer must also list the member as a ready node.
    pub listed: bool,
}

/// Whether the controller serves; relays started before it would only find it missing.
pub fn controller(plan: &Plan) -> Check {
    Check { member: "controller".to_owned(), url: format!("http://{}/readyz", plan.http), listed: false }
}

/// Whether a relay serves.
pub fn health(relay: &RelayPlan) -> Check {
    Check { member: relay.id.to_owned(), url: format!("http://{}/readyz", relay.http), listed: false }
}

/// What has to hold once relays are started: each serves, and steering has seen it.
pub fn relays(plan: &Plan) -> Vec<Check> {
    let nodes = format!("http://{}/v1/nodes", plan.http);
    let seen = |relay: &RelayPlan| Check { member: relay.id.to_owned(), url: nodes.clone(), listed: true };
    plan.relays.iter().map(health).chain(plan.relays.iter().map(seen)).collect()
}

#[derive(Deserialize)]
struct Nodes {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    state: String,
}

/// A client for loopback: no proxy from the environment, no long waits.
///
/// # Errors
/// When the HTTP client cannot be made.
pub fn client() -> Result<reqwest::Client> {
    reqwest::Client::builder().no_proxy().connect_timeout(ANSWER).build().context("HTTP client")
}

/// Asks until it holds.
///
/// # Errors
/// What was last wrong, after `limit`.
pub async fn until_ready(client: &reqwest::Client, check: &Check, limit: Instant) -> Result<(), String> {
    loop {
        let wrong = match ask(client, check).await {
            Ok(()) => return Ok(()),
            Err(wrong) => wrong,
        };
        if Instant::now() >= limit {
            return Err(wrong);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn ask(client: &reqwest::Client, check: &Check) -> Result<(), String> {
    let url = &check.url;
    let answer = client.get(url).timeout(ANSWER).send().await.map_err(|error| {
        if error.is_connect() {
            format!("nothing listens at {url}")
        } else {
            format!("{:#}", anyhow::Error::new(error))
        }
    })?;
    let status = answer.status();
    let text = answer.text().await.map_err(|error| format!("{:#}", anyhow::Error::new(error)))?;
    if !status.is_success() {
        return Err(format!("{url} answers {status}: {}", text.lines().next().unwrap_or_default()));
    }
    if check.listed {
        let Nodes { nodes } = serde_json::from_str(&text).map_err(|error| format!("{url}: {error}"))?;
        let node = nodes.iter().find(|node| node.id == check.member);
        let state = node.map_or("not there", |node| &node.state);
        if state != "ready" {
            return Err(format!("at {url} it is {state}"));
        }
    }
    Ok(())
}

/// A credential from discovery, as TURN REST gives it.
#[derive(Clone, Debug, Deserialize)]
pub struct Credential {
    /// TURN user name: expiry and name.
    pub username: String,
    /// TURN password.
    pub password: String,
    /// Seconds.
    pub ttl: u64,
    /// TURN URIs, nearest first.
    pub uris: Vec<String>,
}

/// Asks discovery for a credential.
///
/// # Errors
/// One line with the answer.
pub async fn credential(client: &reqwest::Client, plan: &Plan, user: &str) -> Result<Credential> {
    let url = format!("http://{}/v1/turn?service=turn&username={user}", plan.http);
    let answer = client.get(&url).timeout(ANSWER).send().await?.error_for_status()?;
    answer.json().await.with_context(|| format!("the answer of {url}"))
}

/// The last lines of a log, indented; empty when there are none.
pub fn last_lines(log: &Path) -> String {
    let tail = || -> std::io::Result<String> {
        let mut file = fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = tail().unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].iter().map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::task::JoinHandle;

    use super::*;

    /// Answers one request after the other with these.
    async fn answers(answers: Vec<(&'static str, &'static str)>) -> (String, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let url = format!("http://{}/", listener.local_addr().expect("address"));
        let server = tokio::spawn(async move {
            for (status, body) in answers {
                let (mut connection, _) = listener.accept().await.expect("connection");
                let mut request = [0; 1024];
                assert_ne!(connection.read(&mut request).await.expect("request"), 0);
                let length = body.len();
                let text = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
                connection.write_all(text.as_bytes()).await.expect("answer");
            }
        });
        (url, server)
    }

    #[tokio::test]
    async fn readiness_is_waited_for_and_a_refusal_is_quoted() {
        let refusal = ("503 Service Unavailable", "no settings");
        let (url, server) = answers(vec![refusal, refusal, ("200 OK", "")]).await;
        let check = Check { member: "eu-1".into(), url, listed: false };
        let client = client().expect("client");
        let refused = until_ready(&client, &check, Instant::now()).await.expect_err("503");
        assert!(refused.ends_with("503 Service Unavailable: no settings"), "{refused}");
        until_ready(&client, &check, Instant::now() + Duration::from_secs(20)).await.expect("ready");
        server.await.expect("server");
        let gone = until_ready(&client, &check, Instant::now()).await.expect_err("closed");
        assert!(gone.starts_with("nothing listens at http://"), "{gone}");
    }

    #[tokio::test]
    async fn a_relay_counts_once_steering_lists_it_as_ready() {
        let bodies = [
            r#"{"nodes":[]}"#,
            r#"{"nodes":[{"id":"eu-1","state":"suspect"},{"id":"us-1","state":"ready"}]}"#,
            r#"{"nodes":[{"id":"eu-1","state":"ready"}]}"#,
        ];
        let (url, server) = answers(bodies.iter().map(|body| ("200 OK", *body)).collect()).await;
        let check = Check { member: "eu-1".into(), url, listed: true };
        let client = client().expect("client");
        for state in ["not there", "suspect"] {
            let wrong = until_ready(&client, &check, Instant::now()).await.expect_err("not yet");
            assert!(wrong.ends_with(&format!("it is {state}")), "{wrong}");
        }
        until_ready(&client, &check, Instant::now()).await.expect("listed");
        server.await.expect("server");
    }

    #[test]
    fn the_end_of_a_log_is_shown() {
        let directory = tempfile::tempdir().expect("directory");
        let log = directory.path().join("a.log");
        assert_eq!(last_lines(&log), "", "no log yet");
        let text: String = (0..5000).map(|n| format!("line {n}\n")).collect();
        fs::write(&log, text).expect("log");
        let shown = last_lines(&log);
        assert_eq!(shown.lines().count(), LOG_LINES);
        assert!(shown.ends_with("    line 4999\n"), "{shown}");
    }
}
