//! coturn's configuration read as one of a Turnpike relay: what has a counterpart, what goes without saying here, and what
//! is left to whoever moves.

mod networks;
mod options;
mod relay;

use serde::Serialize;

use options::{Fate, fate_of};
use relay::Relay;

/// An option of the file and what became of it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct Line {
    /// Line of the file, from 1.
    pub(crate) line: usize,
    /// coturn's name of the option.
    pub(crate) option: String,
    /// What became of it.
    pub(crate) outcome: Outcome,
    /// Which key it is, why nothing has to be done, or what to do.
    pub(crate) why: String,
}

/// What becomes of an option.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// It is in the result.
    Mapped,
    /// It is so here without being asked for, or has no meaning here.
    Implied,
    /// It is not in the result; something has to be done or decided.
    NotMapped,
}

/// The result.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Import {
    /// A relay's configuration, TOML.
    pub(crate) relay: String,
    /// Every option of the file, in its order.
    pub(crate) options: Vec<Line>,
}

/// Reads the text of a `turnserver.conf`. There is nothing it fails at: what cannot be read is not mapped.
pub(crate) fn import(text: &str) -> Import {
    let mut relay = Relay::default();
    let mut options = Vec::new();
    for (index, written) in text.lines().enumerate() {
        let Some((option, value)) = option_of(written) else { continue };
        let (outcome, why) = match fate_of(option) {
            Some(Fate::Mapped(map)) => match map(&mut relay, value) {
                Ok(key) => (Outcome::Mapped, key),
                Err(why) => (Outcome::NotMapped, why),
            },
            Some(Fate::Implied(why)) => (Outcome::Implied, why.to_owned()),
            Some(Fate::NotMapped(why)) => (Outcome::NotMapped, why.to_owned()),
            None => (Outcome::NotMapped, "no option of coturn that is known here".to_owned()),
        };
        options.push(Line { line: index + 1, option: option.to_owned(), outcome, why });
    }
    Import { relay: relay.finish(&options), options }
}

/// Name and value of a line; none of a comment. coturn takes `name=value`, `name value` and `name`, and quotes.
fn option_of(line: &str) -> Option<(&str, &str)> {
    let line = line.trim().trim_start_matches("--");
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let (name, value) = match line.split_once(|c: char| c == '=' || c.is_whitespace()) {
        Some((name, value)) if line[name.len()..].starts_with('=') => (name, value),
        Some((name, value)) => (name, value.trim_start().strip_prefix('=').unwrap_or(value)),
        None => (line, ""),
    };
    Some((name, value.trim().trim_matches('"')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome<'a>(import: &'a Import, option: &str) -> (Outcome, &'a str) {
        let line = import.options.iter().find(|line| line.option == option).expect("it is there");
        (line.outcome, &line.why)
    }

    #[test]
    fn what_has_a_counterpart_is_mapped() {
        let import = import(
            "# a comment\nlistening-port=3478\ntls-listening-port = 5349\nlistening-ip=10.0.0.5\nexternal-ip=198.51.100.7/10.0.0.5\n\
             min-port=50000\nmax-port 60000\nrealm=example.org\nuse-auth-secret\nstatic-auth-secret=north\nstatic-auth-secret=south\n\
             user=alice:wonder:land\ncert=/etc/ssl/turn.pem\npkey=/etc/ssl/turn.key\ndenied-peer-ip=10.0.0.0-10.0.0.5\n\
             denied-peer-ip=192.0.2.1\nuser-quota=12\ntotal-quota=1200\nmax-bps=64000\nno-tcp-relay\nrelay-threads=2\n",
        );
        assert!(import.options.iter().all(|line| line.outcome != Outcome::NotMapped), "{:#?}", import.options);
        let written: toml::Table = toml::from_str(&import.relay).expect("TOML");
        let text = |key: &str| written[key].to_string();
        assert_eq!(
            text("listen"),
            "[\"udp://10.0.0.5:3478\", \"tcp://10.0.0.5:3478\", \"tls://10.0.0.5:5349\", \"dtls://10.0.0.5:5349\"]"
        );
        assert_eq!(text("public_ip"), "\"198.51.100.7\"");
        assert_eq!(text("relay_ports"), "[50000, 60000]");
        assert_eq!(text("rest_secrets"), "[\"north\", \"south\"]");
        assert_eq!(text("static_users"), "[{ password = \"wonder:land\", username = \"alice\" }]");
        assert_eq!(text("denied_peers"), "[\"10.0.0.0/30\", \"10.0.0.4/31\", \"192.0.2.1/32\"]");
        assert_eq!((text("user_quota"), text("max_allocations")), ("12".into(), "1200".into()));
        assert_eq!(written["limits"]["bytes_per_allocation"].to_string(), "64000");
        assert_eq!(written["features"]["tcp_allocations"].to_string(), "false");
    }

    #[test]
    fn what_cannot_be_mapped_is_said_with_what_to_do() {
        let import = import(
            "user=alice:0xbc807ee29df3c9ffa736523fb2c4e8ee\nno-auth\nredis-userdb=\"ip=127.0.0.1\"\nmin-port=none\nfingerprint\n\
             flux-capacitor=88\nallowed-peer-ip=10.1.2.3\nexternal-ip=nowhere\n",
        );
        for (option, why) in [
            ("user", "is a key, from which no password"),
            ("no-auth", "every client authenticates"),
            ("redis-userdb", "users of a database"),
            ("min-port", "\"none\" is no port"),
            ("flux-capacitor", "no option of coturn"),
            ("allowed-peer-ip", "private networks are denied"),
            ("external-ip", "\"nowhere\" is no address"),
        ] {
            let (outcome, said) = outcome(&import, option);
            assert_eq!(outcome, Outcome::NotMapped, "{option}");
            assert!(said.contains(why), "{option}: {said}");
            assert!(import.relay.contains(&format!("# not mapped: {option}")), "{}", import.relay);
        }
        assert_eq!(outcome(&import, "fingerprint").0, Outcome::Implied);
        // No secret stands in a comment.
        assert!(!import.relay.contains("bc807ee"), "{}", import.relay);
    }

    #[test]
    fn without_tls_nothing_listens_for_it() {
        let listens = |text: &str| {
            let written: toml::Table = toml::from_str(&import(text).relay).expect("TOML");
            written["listen"].to_string()
        };
        assert_eq!(listens(""), "[\"udp://0.0.0.0:3478\", \"tcp://0.0.0.0:3478\"]");
        assert_eq!(listens("no-udp\ncert=c\npkey=k\nno-dtls"), "[\"tcp://0.0.0.0:3478\", \"tls://0.0.0.0:5349\"]");
        assert_eq!(listens("listening-ip=2001:db8::1\nno-tcp"), "[\"udp://[2001:db8::1]:3478\"]");
    }

    /// Every option that Debian's turnserver.conf shows, commented out or not, is known here.
    #[test]
    fn every_option_of_debians_file_is_known() {
        let names = include_str!("debian-options.txt");
        let unknown: Vec<&str> = names.lines().filter(|name| fate_of(name).is_none()).collect();
        assert_eq!(unknown, Vec::<&str>::new());
        assert!(names.lines().count() > 80);
    }
}
