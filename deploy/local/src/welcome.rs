//! What a person reads: where things are, what to try, and what happens. The only place that prints.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use crate::description::Description;
use crate::plan::Plan;
use crate::supervisor::Event;

/// Text for people on a terminal or in a pipe, or one line of JSON.
pub struct Screen {
    json: bool,
    style: Style,
}

/// Escape sequences, or nothing where colour is not wanted.
#[derive(Clone, Copy, Debug, Default)]
struct Style {
    bold: &'static str,
    dim: &'static str,
    accent: &'static str,
    warn: &'static str,
    end: &'static str,
}

impl Style {
    const COLOUR: Self = Self { bold: "\x1b[1m", dim: "\x1b[2m", accent: "\x1b[36m", warn: "\x1b[33m", end: "\x1b[0m" };

    /// Colour on a terminal, unless the environment says no (no-color.org).
    fn of_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
        if io::stdout().is_terminal() && !refused { Self::COLOUR } else { Self::default() }
    }
}

impl Screen {
    /// With `json` standard output carries one line of JSON and nothing else.
    pub fn new(json: bool) -> Self {
        let screen = Self { json, style: Style::of_stdout() };
        screen.say("starting controller and relays...");
        screen
    }

    /// Says that the cluster is ready.
    ///
    /// # Errors
    /// When the description cannot be written as JSON.
    pub fn welcome(&self, description: &Description, plan: &Plan, took: Duration) -> Result<()> {
        if self.json {
            println!("{}", serde_json::to_string(description)?);
        } else {
            let here = std::env::current_dir().unwrap_or_default();
            println!("{}", welcome(description, plan, took, &here, self.style));
        }
        Ok(())
    }

    /// Says what happened to a process.
    pub fn event(&self, event: &Event) {
        let Style { warn, end, .. } = self.style;
        match event {
            Event::Started { name, pid } => self.say(&format!("{name} started again as process {pid}")),
            Event::Ended { name, how, again_after } if again_after.is_zero() => {
                self.say(&format!("{warn}{name} ended{end} ({how})"));
            }
            Event::Ended { name, how, again_after } => self.say(&format!(
                "{warn}{name} ended{end} ({how}); it keeps ending, next start in {} s",
                again_after.as_secs_f32()
            )),
            Event::Unstartable { name, error } => self.say(&format!("{warn}cannot start {name}{end}: {error}")),
        }
    }

    /// Says that a process that was started again is ready, or is not.
    pub fn back(&self, name: &str, outcome: Result<Duration, String>) {
        match outcome {
            Ok(after) => self.say(&format!("{name} is ready again, {} ms after its start", after.as_millis())),
            Err(wrong) => self.say(&format!("{name} is not ready: {wrong}")),
        }
    }

    /// Says that the end has begun.
    pub fn stopping(&self) {
        self.say("stopping...");
    }

    /// Says that nothing runs any more.
    pub fn stopped(&self) {
        self.say("stopped");
    }

    /// Standard output belongs to the JSON where that is asked for.
    fn say(&self, line: &str) {
        if self.json {
            eprintln!("turnpike-local: {line}");
        } else {
            println!("{line}");
        }
    }
}

/// Says why there is no cluster.
pub fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

fn welcome(description: &Description, plan: &Plan, took: Duration, here: &Path, style: Style) -> String {
    let Style { bold, dim, accent, end, .. } = style;
    let mut text = String::new();
    // Writing to a String does not fail.
    let mut line = |args: std::fmt::Arguments<'_>| _ = writeln!(text, "{args}");
    let relays = description.relays.len();
    line(format_args!(
        "\n{bold}Turnpike is running{end}: a controller and {relays} relay{} in {} region{} {dim}(ready after {:.1} s; Ctrl-C stops all){end}\n",
        plural(relays),
        plan.regions(),
        plural(plan.regions()),
        took.as_secs_f32()
    ));
    line(format_args!("  Call page   {accent}{}{end}   open it twice, in two windows", description.call_page));
    line(format_args!("  Console     {accent}{}{end}", description.console));
    line(format_args!("              {dim}to drain relays there, sign in with{end} {}", description.console_key));
    for relay in &description.relays {
        let process = &relay.process;
        line(format_args!("  Relay       {:<6} turn:{}  {dim}process {}{end}", process.id, relay.address, process.pid));
    }
    line(format_args!("\n  A credential to throw away, good for {} h", description.ttl / 3600));
    line(format_args!("    username  {}\n    password  {}", description.username, description.password));

    let turnctl =
        format!("{} --config {}", program(&description.turnctl, here), path(&description.turnctl_config, here));
    line(format_args!("\n  {bold}Try next{end}"));
    for (arguments, what) in [
        ("status", "is all well?"),
        ("nodes", "relays, load, epochs"),
        ("probe", "allocate, permit, echo: each step timed"),
        ("allocations", "who holds what; open a call first"),
        ("events --watch", "what happens, as it happens"),
    ] {
        line(format_args!("    {turnctl} {arguments:<14} {dim}# {what}{end}"));
    }
    if let Some(relay) = description.relays.first() {
        line(format_args!("    {}", uclient(description, plan)));
        line(format_args!(
            "    {dim}# coturn's client (Debian package coturn): two clients, each message through {}{end}",
            relay.process.id
        ));
        line(format_args!(
            "    kill -9 {:<8} {dim}# ends {} in the middle of a call: it is back at once and the call goes on{end}",
            relay.process.pid, relay.process.id
        ));
    }
    if !plan.page_hosts[0].is_loopback() {
        line(format_args!("\n  {}", phone_note(description, plan, here)));
    }
    line(format_args!("\n  Logs in {}", path(&description.dir.join("logs"), here)));
    text.trim_end().to_owned() + "\n"
}

/// The line for coturn's client, against the first relay. It takes its peers from the relay itself (`-y`), so the line
/// works whatever the address.
fn uclient(description: &Description, plan: &Plan) -> String {
    let relay = &plan.relays[0];
    format!(
        "turnutils_uclient -y -s -m 2 -n 50 -p {} -u {} -w {} {}",
        relay.listen.port(),
        quoted(&description.username),
        quoted(&description.password),
        relay.public_ip
    )
}

fn phone_note(description: &Description, plan: &Plan, here: &Path) -> String {
    if plan.https {
        format!(
            "From a phone on the same network open {} and accept the certificate, or install the\n  authority first: {}ca.pem (its key stays in {})",
            description.call_page,
            description.call_page,
            path(&description.dir.join("pki"), here)
        )
    } else {
        "A phone's browser gives camera and microphone to https pages only: add --https for them".to_owned()
    }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// A path as one types it from `here`.
fn path(path: &Path, here: &Path) -> String {
    quoted(&path.strip_prefix(here).unwrap_or(path).display().to_string())
}

/// The same for a program: without a slash the shell would look elsewhere.
fn program(program: &Path, here: &Path) -> String {
    let word = path(program, here);
    if word.contains('/') { word } else { format!("./{word}") }
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=+@%,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        for (word, expected) in [
            ("1790000000:guest", "1790000000:guest"),
            ("a+b/c=", "a+b/c="),
            ("two words", "'two words'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
        ] {
            assert_eq!(quoted(word), expected, "{word}");
        }
    }

    #[test]
    fn paths_below_the_current_directory_are_short() {
        let here = Path::new("/home/a");
        assert_eq!(path(Path::new("/home/a/target/release/turnctl"), here), "target/release/turnctl");
        assert_eq!(path(Path::new("/srv/x y"), here), "'/srv/x y'");
        assert_eq!(program(Path::new("/home/a/turnctl"), here), "./turnctl");
    }
}
