//! `turnctl ca`: certificates for the members of a cluster and the people who run it.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::failure::{Failure, Result};
use crate::output::{Block, Cell, Output, View};
use crate::pki::{CA_CERTIFICATE, CA_KEY, Ca, Facts, Identity, create_ca};

/// Make the certificates of a cluster
#[derive(Debug, Subcommand)]
pub(crate) enum CaCommand {
    /// Make a certificate authority in a directory
    #[command(after_help = INIT_EXAMPLES)]
    Init(InitArgs),
    /// Make a certificate for a relay, a controller or a person
    #[command(after_help = ISSUE_EXAMPLES)]
    Issue(IssueArgs),
}

const INIT_EXAMPLES: &str = "\
Examples:
  turnctl ca init pki

Keep pki/ca.key to yourself: who has it can make members. Give members pki/ca.pem.";

const ISSUE_EXAMPLES: &str = "\
Examples:
  turnctl ca issue pki --controller c1 --dns c1.example.org --ip 198.51.100.4
  turnctl ca issue pki --relay eu-1
  turnctl ca issue pki --admin alice --days 90";

/// Where to make an authority.
#[derive(Args, Debug)]
pub(crate) struct InitArgs {
    /// Directory for ca.pem and ca.key
    directory: PathBuf,
    /// Name in the certificate, for people
    #[arg(long, default_value = "Turnpike cluster")]
    name: String,
    /// Replace an authority that is there; its certificates are worth nothing then
    #[arg(long)]
    force: bool,
}

/// What to issue.
#[derive(Args, Debug)]
pub(crate) struct IssueArgs {
    /// Directory of the authority
    directory: PathBuf,
    #[command(flatten)]
    subject: Subject,
    /// A further DNS name of a controller
    #[arg(long)]
    dns: Vec<String>,
    /// An IP address of a controller
    #[arg(long)]
    ip: Vec<IpAddr>,
    /// Days it is valid
    #[arg(long, default_value_t = 365)]
    days: u32,
    /// Where to put the files [default: the authority's directory]
    #[arg(long, value_name = "DIRECTORY")]
    out: Option<PathBuf>,
    /// Replace files that are there
    #[arg(long)]
    force: bool,
}

/// Who it is for.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Subject {
    /// For a relay, by its node_id
    #[arg(long, value_name = "NODE")]
    relay: Option<String>,
    /// For a person who may do everything
    #[arg(long, value_name = "NAME")]
    admin: Option<String>,
    /// For a person who may look, revoke, discover and mint credentials
    #[arg(long, value_name = "NAME")]
    operator: Option<String>,
    /// For a person who may look
    #[arg(long, value_name = "NAME")]
    viewer: Option<String>,
    /// For a controller, by its id
    // The identifier is that of the global option of the same name, which it stands in for here.
    #[arg(id = "controllers", long = "controller", value_name = "ID")]
    controller: Option<String>,
}

impl Subject {
    /// The one that was given; clap sees to it that there is one. The controller comes last: clap hands the value
    /// of TURNCTL_CONTROLLER, which means the global option, down to here.
    fn identity(&self) -> Option<Identity> {
        let given = |name: &Option<String>, identity: fn(String) -> Identity| name.clone().map(identity);
        given(&self.relay, Identity::Relay)
            .or_else(|| given(&self.admin, Identity::Admin))
            .or_else(|| given(&self.operator, Identity::Operator))
            .or_else(|| given(&self.viewer, Identity::Viewer))
            .or_else(|| given(&self.controller, Identity::Controller))
    }
}

pub(crate) fn run(command: &CaCommand, output: Output) -> Result {
    match command {
        CaCommand::Init(args) => init(args, output),
        CaCommand::Issue(args) => issue(args, output),
    }
}

fn init(args: &InitArgs, output: Output) -> Result {
    let ca = create_ca(&args.name)?;
    ca.write(&args.directory, args.force)?;
    output.show(&MadeView {
        identity: None,
        certificate: args.directory.join(CA_CERTIFICATE),
        key: args.directory.join(CA_KEY),
        expires_on: Facts::from_pem(ca.certificate())?.not_after.date().to_string(),
    })
}

fn issue(args: &IssueArgs, output: Output) -> Result {
    let identity = args.subject.identity().ok_or_else(|| Failure::usage("say who the certificate is for"))?;
    let ca = Ca::load(&args.directory)?;
    let issued = ca.issue(&identity, &args.dns, &args.ip, Duration::from_secs(u64::from(args.days) * 86_400))?;
    let directory = args.out.as_ref().unwrap_or(&args.directory);
    let (certificate, key) = issued.write(directory, &identity.file_stem(), args.force)?;
    output.show(&MadeView {
        identity: Some(identity.to_string()),
        certificate,
        key,
        expires_on: Facts::from_pem(&issued.certificate)?.not_after.date().to_string(),
    })
}

/// What was made, and where.
#[derive(Debug, Serialize)]
struct MadeView {
    /// None for an authority.
    identity: Option<String>,
    certificate: PathBuf,
    key: PathBuf,
    expires_on: String,
}

impl View for MadeView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        vec![Block::Fields(vec![
            ("Identity", Cell::from(self.identity.as_deref().unwrap_or("certificate authority"))),
            ("Certificate", Cell::from(self.certificate.to_string_lossy())),
            ("Key", Cell::from(self.key.to_string_lossy())),
            ("Expires", Cell::from(&self.expires_on)),
        ])]
    }
}
