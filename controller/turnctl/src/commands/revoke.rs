//! `turnctl revoke-relay` and `turnctl reinstate-relay`: whose certificates are refused.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use turnpike_proto::v1::admin_client::AdminClient;
use turnpike_proto::v1::{ReinstateRelayRequest, RevokeRelayRequest};

use crate::connection::ConnectionOptions;
use crate::failure::{Failure, Result};
use crate::output::{Block, Cell, Output, View};
use crate::pki::Facts;
use crate::units;

/// Refuse the certificates of a relay from now on, at controllers and on the backbone (role admin)
#[derive(Args, Debug)]
#[command(after_help = REVOKE_EXAMPLES)]
pub(crate) struct RevokeArgs {
    /// The relay
    #[arg(value_name = "RELAY")]
    node_id: String,
    /// Refuse this certificate alone: its serial number in hexadecimal, as openssl x509 -serial prints it
    #[arg(long, value_name = "HEX", conflicts_with = "certificate")]
    serial: Option<String>,
    /// Refuse this certificate alone: its PEM file
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
}

const REVOKE_EXAMPLES: &str = "\
Examples:
  turnctl revoke-relay eu-1                                  the machine is lost
  turnctl revoke-relay eu-1 --certificate relay-eu-1.pem     its key has leaked, and it has a new one

Its session ends and every link to it is closed within seconds. Calls that it carries by itself go on until
the machine is stopped: a relay needs nobody to carry a packet.";

/// Take the certificates of a relay again (role admin)
#[derive(Args, Debug)]
#[command(after_help = REINSTATE_EXAMPLES)]
pub(crate) struct ReinstateArgs {
    /// The relay
    #[arg(value_name = "RELAY")]
    node_id: String,
}

const REINSTATE_EXAMPLES: &str = "Examples:\n  turnctl reinstate-relay eu-1";

pub(crate) async fn revoke(args: &RevokeArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let serial = args.serial()?;
    let cluster = connection.connect().await?;
    let request = RevokeRelayRequest { node_id: args.node_id.clone(), serial: serial.clone() };
    let answer = AdminClient::new(cluster.channel.clone()).revoke_relay(request).await;
    let answer = answer.map_err(|status| cluster.failure(&format!("revoke relay {}", args.node_id), &status))?;
    let serial = Some(units::hex(&serial)).filter(|serial| !serial.is_empty());
    let (node_id, unchanged) = (args.node_id.clone(), answer.into_inner().unchanged);
    output.show_line(&TrustView { node_id, trusted: false, serial, unchanged })
}

pub(crate) async fn reinstate(args: &ReinstateArgs, connection: &ConnectionOptions, output: Output) -> Result {
    let cluster = connection.connect().await?;
    let request = ReinstateRelayRequest { node_id: args.node_id.clone() };
    let answer = AdminClient::new(cluster.channel.clone()).reinstate_relay(request).await;
    let answer = answer.map_err(|status| cluster.failure(&format!("reinstate relay {}", args.node_id), &status))?;
    let (node_id, unchanged) = (args.node_id.clone(), answer.into_inner().unchanged);
    output.show_line(&TrustView { node_id, trusted: true, serial: None, unchanged })
}

impl RevokeArgs {
    /// Serial number of the one certificate that is meant; empty is all of them.
    fn serial(&self) -> Result<Vec<u8>> {
        if let Some(text) = &self.serial {
            let number = units::unhex(text.trim_start_matches("serial=").trim_start_matches("0x"));
            return number.filter(|bytes| !bytes.is_empty()).ok_or_else(|| {
                Failure::usage(format!("{text:?} is not a serial number")).remedy("openssl x509 -serial prints it")
            });
        }
        let Some(file) = &self.certificate else { return Ok(Vec::new()) };
        let pem = std::fs::read_to_string(file)
            .map_err(|error| Failure::usage(format!("cannot read {}: {error}", file.display())))?;
        let facts = Facts::from_pem(&pem).map_err(|error| Failure::usage(format!("{}: {error}", file.display())))?;
        match &facts.identity {
            Some(identity) if identity.to_string() == format!("turnpike://relay/{}", self.node_id) => Ok(facts.serial),
            _ => Err(Failure::usage(format!("{} is not a certificate of relay {}", file.display(), self.node_id))),
        }
    }
}

#[derive(Serialize)]
struct TrustView {
    node_id: String,
    trusted: bool,
    /// Of the one certificate.
    serial: Option<String>,
    unchanged: bool,
}

impl View for TrustView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        let which = match &self.serial {
            Some(serial) => format!("certificate {serial} of relay {}", self.node_id),
            None => format!("every certificate of relay {}", self.node_id),
        };
        let line = match (self.trusted, self.unchanged) {
            (false, false) => format!("{which} is refused from now on"),
            (false, true) => format!("{which} was refused already"),
            (true, false) => format!("{which} is taken again"),
            (true, true) => format!("no certificate of relay {} was refused", self.node_id),
        };
        vec![Block::Lines(vec![Cell::from(line)])]
    }
}
