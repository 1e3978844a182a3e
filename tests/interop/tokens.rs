//! Third-party authorization (RFC 7635) with coturn's tools: `turnutils_oauth` seals tokens, `turnutils_uclient` seals
//! and uses them.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use harness::cluster::{Cluster, RelayOptions};
use harness::place::Place;
use harness::turn::{Login, TurnClient};
use harness::{Host, run_within};
use turn_core::Transport;
use turn_core::client::Security;

const SERVER_NAME: &str = "turn.example.org";

/// The keys that `turnutils_uclient -J` is built with, less the newline behind each, which AES has no room for.
const UCLIENT_KEYS: [(&str, &str, &[u8]); 3] = [
    ("north", "A256GCM", b"01234567890123456789012345678901"),
    ("union", "A128GCM", b"1234567890123456"),
    ("oldempire", "A256GCM", b"12345678901234567890123456789012"),
];

/// A relay of its own that takes tokens under these keys, and nobody's password.
fn options(keys: &[(&str, &str, &[u8])]) -> RelayOptions {
    let keys: Vec<String> = keys
        .iter()
        .map(|(kid, algorithm, key)| {
            let key = STANDARD.encode(key);
            format!("{{ kid = \"{kid}\", algorithm = \"{algorithm}\", key = \"{key}\" }}")
        })
        .collect();
    let keys = keys.join(", ");
    let more = format!("[third_party]\nserver_name = \"{SERVER_NAME}\"\nkeys = [{keys}]");
    RelayOptions { workers: 2, more, ..RelayOptions::in_region("eu") }
}

/// coturn's client authenticates by tokens that it seals itself, over UDP and TCP: every message sent is received.
#[test]
fn uclient_with_its_own_tokens() -> Result<()> {
    run_within(Duration::from_secs(120), async |test| {
        let cluster = Cluster::new(test.path())?;
        let relay = cluster.relay("eu-1", &Place::on_loopback(12), &options(&UCLIENT_KEYS)).await?;
        for tcp in [false, true] {
            let mut command = Command::new("turnutils_uclient");
            command.args(["-J", "-y", "-c", "-s", "-z", "20", "-m", "10", "-n", "100", "-l", "172"]);
            command.args(tcp.then_some("-t"));
            command.args(["-p", &relay.address().port().to_string(), &relay.address().ip().to_string()]);
            let output = tokio::time::timeout(Duration::from_secs(50), Host::Machine.output(command))
                .await
                .context("turnutils_uclient did not end")??;
            let text = String::from_utf8_lossy(&output.stdout);
            let tail = || text.lines().rev().take(8).collect::<Vec<_>>().join(" | ");
            ensure!(text.contains("tot_send_msgs=1000, tot_recv_msgs=1000"), "{}", tail());
            let transport = if tcp { "TCP" } else { "UDP" };
            test.figure(&format!("turnutils_uclient -J, {transport}"), "1000 sent, 1000 received");
        }
        Ok(())
    })
}

/// A token of `turnutils_oauth` opens the relay for our client, for as long as it lasts; one for another server does not.
#[test]
fn tokens_of_turnutils_oauth() -> Result<()> {
    run_within(Duration::from_secs(60), async |test| {
        let key = random::<32>()?;
        let mac_key = random::<20>()?;
        let cluster = Cluster::new(test.path())?;
        let relay = cluster.relay("eu-1", &Place::on_loopback(13), &options(&[("kid-1", "A256GCM", &key)])).await?;
        for (server_name, opens) in [(SERVER_NAME, true), ("other.example.org", false)] {
            let token = seal(server_name, "kid-1", &key, &mac_key, 900).await?;
            let login = Login { username: "kid-1".into(), password: String::new() };
            let from = Place::on_loopback(14).address;
            let mut client = TurnClient::open(&Host::Machine, from, relay.address(), Transport::Udp, &login)
                .await?
                .with_security(Security::Token { token, mac_key: mac_key.to_vec() });
            let allocated = client.allocate().await;
            ensure!(allocated.is_ok() == opens, "{server_name}: {allocated:?}");
            if opens {
                client.permit(from).await?;
            }
        }
        Ok(())
    })
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// A token made now, for so many seconds.
async fn seal(server_name: &str, kid: &str, key: &[u8], mac_key: &[u8], lifetime: u32) -> Result<Vec<u8>> {
    let mut command = Command::new("turnutils_oauth");
    command.args(["-e", "-i", server_name, "-j", kid, "-k", &STANDARD.encode(key), "-n", "A256GCM"]);
    command.args(["-l", "1", "-m", "1", "-o", &STANDARD.encode(random::<12>()?), "-p", &STANDARD.encode(mac_key)]);
    command.args(["-r", &lifetime.to_string()]);
    let output = Host::Machine.output(command).await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, rest) = text.split_once("\"access_token\":\"").with_context(|| format!("no token: {text}"))?;
    let (token, _) = rest.split_once('"').context("the token does not end")?;
    Ok(STANDARD.decode(token)?)
}
