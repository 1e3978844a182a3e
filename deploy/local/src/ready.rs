//! Waiting until every process serves, and the questions asked of a cluster that does.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::plan::Plan;

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
}

/// What has to answer before the cluster is called ready, in the order in which things come up.
pub fn checks(plan: &Plan) -> Vec<Check> {
    let check = |member: &str, url: String| Check { member: member.to_owned(), url };
    let mut all = vec![check("controller", format!("http://{}/readyz", plan.http))];
    all.extend(plan.relays.iter().map(|relay| check(relay.id, format!("http://{}/readyz", relay.http))));
    // A relay may serve before steering has seen it: whoever asks for its region has to get it.
    for relay in &plan.relays {
        all.push(check(
            relay.id,
            format!("http://{}/v1/ice-servers?region={}&user=ready&limit=1", plan.http, relay.region),
        ));
    }
    all
}

/// A client for loopback: no proxy from the environment, no long waits.
///
/// # Errors
/// When the HTTP client cannot be made.
pub fn client() -> Result<reqwest::Client> {
    reqwest::Client::builder().no_proxy().connect_timeout(ANSWER).build().context("HTTP client")
}

/// Asks until the answer is 200.
///
/// # Errors
/// What was last wrong, after `limit`.
pub async fn until_ready(client: &reqwest::Client, check: &Check, limit: Instant) -> Result<(), String> {
    loop {
        let wrong = match client.get(&check.url).timeout(ANSWER).send().await {
            Ok(answer) if answer.status().is_success() => return Ok(()),
            Ok(answer) => {
                let status = answer.status();
                let text = answer.text().await.unwrap_or_default();
                format!("{} answers {status}: {}", check.url, text.lines().next().unwrap_or_default())
            }
            Err(error) if error.is_connect() => format!("nothing listens at {}", check.url),
            Err(error) => format!("{:#}", anyhow::Error::new(error)),
        };
        if Instant::now() >= limit {
            return Err(wrong);
        }
        tokio::time::sleep(PAUSE).await;
    }
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

    use super::*;

    #[tokio::test]
    async fn readiness_is_waited_for_and_a_refusal_is_quoted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let url = format!("http://{}/readyz", listener.local_addr().expect("address"));
        let check = Check { member: "eu-1".into(), url };
        let server = tokio::spawn(async move {
            for answer in ["503 Service Unavailable", "200 OK"] {
                let (mut connection, _) = listener.accept().await.expect("connection");
                let mut request = [0; 1024];
                assert_ne!(connection.read(&mut request).await.expect("request"), 0);
                let text = format!("HTTP/1.1 {answer}\r\ncontent-length: 11\r\nconnection: close\r\n\r\nno settings");
                connection.write_all(text.as_bytes()).await.expect("answer");
            }
        });
        let client = client().expect("client");
        let refused = until_ready(&client, &check, Instant::now()).await.expect_err("503");
        assert!(refused.ends_with("503 Service Unavailable: no settings"), "{refused}");
        until_ready(&client, &check, Instant::now() + Duration::from_secs(20)).await.expect("ready");
        server.await.expect("server");
        let gone = until_ready(&client, &check, Instant::now()).await.expect_err("closed");
        assert!(gone.starts_with("nothing listens at http://"), "{gone}");
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
