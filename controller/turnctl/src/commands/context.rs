//! `turnctl context`: the clusters this person works with.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::connection::ConnectionOptions;
use crate::contexts::{self, Contexts};
use crate::failure::{Exit, Failure, Result};
use crate::output::{Block, Cell, Output, Tone, View};

/// Choose between clusters
#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// List the contexts
    #[command(visible_alias = "ls", after_help = "Examples:\n  turnctl context list")]
    List,
    /// Print the name of the current context
    #[command(after_help = "Examples:\n  turnctl context current")]
    Current,
    /// Make a context the current one
    #[command(after_help = "Examples:\n  turnctl context use production")]
    Use(NameArgs),
    /// Make or change a context from --controller, --ca, --cert and --key; the first becomes current
    #[command(after_help = SET_EXAMPLES)]
    Set(NameArgs),
    /// Forget a context; its certificate files stay
    #[command(after_help = "Examples:\n  turnctl context delete staging")]
    Delete(NameArgs),
}

const SET_EXAMPLES: &str = "\
Examples:
  turnctl context set local --controller https://127.0.0.1:9443 \\
      --ca pki/ca.pem --cert pki/admin-alice.pem --key pki/admin-alice.key
  turnctl context set production --controller https://c1.example.org:9443 \
      --controller https://c2.example.org:9443";

/// Which context.
#[derive(Args, Debug)]
pub(crate) struct NameArgs {
    /// Its name
    name: String,
}

pub(crate) fn run(command: &ContextCommand, options: &ConnectionOptions, output: Output) -> Result {
    let file = contexts::location(options.config.as_deref())?;
    let mut contexts = Contexts::load(&file)?;
    match command {
        ContextCommand::List => output.show(&ContextsView::from(&contexts)),
        ContextCommand::Current => {
            let current = contexts.current.ok_or_else(|| {
                Failure::new(Exit::NotFound, "no context is current").remedy("choose one with 'turnctl context use'")
            })?;
            output.show(&CurrentView { current })
        }
        ContextCommand::Use(NameArgs { name }) => {
            contexts.named(name)?;
            contexts.current = Some(name.clone());
            contexts.save(&file)?;
            output.note(&format!("the current context is {name}"));
            Ok(())
        }
        ContextCommand::Set(NameArgs { name }) => {
            set(&mut contexts, name, options)?;
            contexts.save(&file)?;
            output.note(&format!("context {name} is set in {}", file.display()));
            Ok(())
        }
        ContextCommand::Delete(NameArgs { name }) => {
            contexts.contexts.remove(name).ok_or_else(|| contexts::unknown(name, &contexts))?;
            contexts.current.take_if(|current| current == name);
            contexts.save(&file)?;
            output.note(&format!("context {name} is forgotten"));
            Ok(())
        }
    }
}

fn set(contexts: &mut Contexts, name: &str, options: &ConnectionOptions) -> Result {
    let context = contexts.contexts.entry(name.to_owned()).or_default();
    if !options.controllers.is_empty() {
        context.controllers.clone_from(&options.controllers);
    }
    for (place, given) in
        [(&mut context.ca, &options.ca), (&mut context.certificate, &options.cert), (&mut context.key, &options.key)]
    {
        if let Some(given) = given {
            *place = absolute(given)?;
        }
    }
    if context.controllers.is_empty() {
        return Err(Failure::usage(format!("context '{name}' has no controller")).remedy("give --controller"));
    }
    contexts.current.get_or_insert_with(|| name.to_owned());
    Ok(())
}

/// The command is run from here, the file is read from anywhere.
fn absolute(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| Failure::usage(format!("cannot read {}: {error}", path.display())))
}

#[derive(Debug, Serialize)]
struct CurrentView {
    current: String,
}

impl View for CurrentView {
    fn blocks(&self, _wide: bool, _now_ms: u64) -> Vec<Block> {
        vec![Block::Lines(vec![Cell::from(&self.current)])]
    }
}

#[derive(Debug, Serialize)]
struct ContextsView {
    contexts: Vec<ContextView>,
}

#[derive(Debug, Serialize)]
struct ContextView {
    name: String,
    current: bool,
    controllers: Vec<String>,
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl From<&Contexts> for ContextsView {
    fn from(contexts: &Contexts) -> Self {
        let view = |(name, context): (&String, &contexts::Context)| ContextView {
            name: name.clone(),
            current: contexts.current.as_ref() == Some(name),
            controllers: context.controllers.clone(),
            ca: context.ca.clone(),
            certificate: context.certificate.clone(),
            key: context.key.clone(),
        };
        Self { contexts: contexts.contexts.iter().map(view).collect() }
    }
}

impl View for ContextsView {
    fn empty(&self) -> Option<&'static str> {
        self.contexts.is_empty().then_some("no contexts; make one with 'turnctl context set'")
    }

    fn blocks(&self, wide: bool, _now_ms: u64) -> Vec<Block> {
        let mut head = vec!["CURRENT", "NAME", "CONTROLLERS", "CERTIFICATE"];
        if wide {
            head.extend(["KEY", "CA"]);
        }
        let row = |context: &ContextView| {
            let mut row = vec![
                Cell::toned(if context.current { "*" } else { "" }, Tone::Good),
                Cell::from(&context.name),
                Cell::from(context.controllers.join(",")),
                Cell::from(context.certificate.to_string_lossy()),
            ];
            if wide {
                row.extend([Cell::from(context.key.to_string_lossy()), Cell::from(context.ca.to_string_lossy())]);
            }
            row
        };
        vec![Block::Table { head, rows: self.contexts.iter().map(row).collect() }]
    }
}
