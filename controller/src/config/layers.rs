//! Where configuration comes from: a TOML file, over it the environment, over it flags.

use std::collections::BTreeMap;
use std::path::Path;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use toml::{Table, Value};

use super::{Config, ConfigError, Settings};

const PREFIX: &str = "TURNPIKE_CONTROLLER_";

/// How the text of a flag or variable becomes a value.
#[derive(Clone, Copy)]
enum Form {
    Text,
    Number,
    /// `a,b` or a TOML array.
    List,
    /// `name:password,name:password` or a TOML array of tables.
    Users,
    /// TOML, as in the file.
    Toml,
}

/// Every key that can be given outside the file. Tables come before the keys in them.
const KEYS: &[(&str, Form, &str)] = &[
    ("id", Form::Text, "Name of this replica"),
    ("region", Form::Text, "Region for clients that ask for none"),
    ("grpc", Form::Text, "Address of gRPC, always mTLS [127.0.0.1:9443]"),
    ("http", Form::Text, "Address of HTTP: discovery, console, metrics [127.0.0.1:8080]"),
    ("tls", Form::Toml, "{ca, certificate, key}"),
    ("tls.ca", Form::Text, "PEM file of the cluster's CA"),
    ("tls.certificate", Form::Text, "PEM file of this controller's certificate"),
    ("tls.key", Form::Text, "PEM file of its private key"),
    ("store", Form::Toml, "{kind, ...}"),
    ("store.kind", Form::Text, "embedded or etcd"),
    ("store.path", Form::Text, "File of the embedded store"),
    ("store.endpoints", Form::List, "URLs of etcd's members"),
    ("store.prefix", Form::Text, "Prefix of every key in etcd [turnpike/]"),
    ("store.ca", Form::Text, "PEM file of etcd's CA"),
    ("store.certificate", Form::Text, "PEM file of the certificate shown to etcd"),
    ("store.key", Form::Text, "PEM file of its private key"),
    ("store.user", Form::Text, "User at etcd"),
    ("store.password", Form::Text, "Password at etcd"),
    ("realm", Form::Text, "TURN realm of the cluster [turnpike]"),
    ("rest_secrets", Form::List, "TURN REST secrets, newest first [made at the first start]"),
    ("static_users", Form::Users, "Users with fixed passwords, name:password,..."),
    ("api_keys", Form::List, "Keys for HTTP discovery and the console [open to all]"),
    ("console_keys", Form::Toml, "[{name, role, key}, ...]: who may drain relays at the console [nobody]"),
    ("credential_ttl", Form::Number, "Seconds a credential lives [86400]"),
    ("cors_origins", Form::List, "Origins whose pages may ask [*]"),
    ("distances", Form::Toml, "[{from, to, ms}, ...]"),
    ("regions", Form::Toml, "[{name, latitude, longitude}, ...]"),
    ("geo", Form::Text, "MaxMind database (City) that places clients' networks"),
    ("trusted_proxies", Form::List, "Networks of proxies before http whose X-Forwarded-For is believed"),
    ("dns", Form::Toml, "{listen, zone, name_servers, ttl, rate}"),
    ("dns.listen", Form::List, "Addresses of the DNS server, UDP and TCP [none]"),
    ("dns.zone", Form::Text, "Zone that it is authoritative for"),
    ("dns.name_servers", Form::List, "Names by which the zone is delegated to the controllers"),
    ("dns.ttl", Form::Number, "Seconds a DNS answer lives [10]"),
    ("dns.rate", Form::Number, "DNS answers a second to one address over UDP, 0 is no limit [100]"),
    ("rate", Form::Toml, "{address, key}"),
    ("rate.address", Form::Number, "HTTP discovery: answers a second to one address, 0 is no limit [100]"),
    ("rate.key", Form::Number, "HTTP discovery: answers a second to one API key, 0 is no limit [1000]"),
    ("user_quota", Form::Number, "Allocations of one user on one relay, 0 is no limit [0]"),
    ("denied_peers", Form::List, "Peer networks denied beyond the built-in list"),
    ("lease", Form::Number, "Seconds a silent relay stays a member [5]"),
    ("usage", Form::Toml, "{retention_hours, max_entries}"),
    ("usage.retention_hours", Form::Number, "Hours the usage of an ended allocation is kept [168]"),
    ("usage.max_entries", Form::Number, "Ended allocations whose usage is kept, at most [200000]"),
    ("overload", Form::Toml, "{cpu_permille, allocations_percent}"),
    ("overload.cpu_permille", Form::Number, "A relay busier than this is overloaded [850]"),
    ("overload.allocations_percent", Form::Number, "A relay fuller than this is overloaded [90]"),
    ("log", Form::Text, "Log filter [info]"),
    ("log_format", Form::Text, "text or json [text]"),
    ("otlp_endpoint", Form::Text, "OTLP collector (gRPC) that traces go to [OTEL_EXPORTER_OTLP_ENDPOINT, else none]"),
];

/// The command line.
pub fn command() -> Command {
    let config = Arg::new("config").long("config").short('c').value_name("FILE").env(variable("config"));
    let command = Command::new("controller")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Turnpike's control plane: fleet, steering, discovery, console")
        .arg(config.help("Configuration file (TOML); flags and environment override it"))
        .arg(
            Arg::new("check-config")
                .long("check-config")
                .action(ArgAction::SetTrue)
                .help("Check the configuration and the files it names, then exit: 0 good, 78 not"),
        );
    KEYS.iter().fold(command, |command, (key, _, help)| {
        command.arg(
            Arg::new(*key).long(flag(key)).env(variable(key)).hide_env_values(true).value_name("VALUE").help(*help),
        )
    })
}

/// Reads, merges and checks the configuration that `matches` of [`command`] describe.
///
/// # Errors
/// The first key that is wrong.
pub fn load(matches: &ArgMatches) -> Result<Settings, ConfigError> {
    refuse_unknown(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()))?;
    let file = matches.get_one::<String>("config");
    let mut table = file.map_or_else(|| Ok(Table::new()), |path| read(Path::new(path)))?;
    let mut origins = BTreeMap::new();
    for (key, form, _) in KEYS {
        let Some(text) = matches.get_one::<String>(key) else {
            continue;
        };
        let origin = match matches.value_source(key) {
            Some(ValueSource::EnvVariable) => format!("{}: ", variable(key)),
            _ => format!("--{}: ", flag(key)),
        };
        let value = value(*form, text).map_err(|why| ConfigError::new(*key, why).from(&origin))?;
        set(&mut table, key, value);
        origins.insert(*key, origin);
    }
    let in_file = file.map(|path| format!("{path}: ")).unwrap_or_default();
    let located = |error: ConfigError| {
        let overriding = origins.iter().filter(|(key, _)| {
            error.key.strip_prefix(**key).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        });
        let origin = overriding.max_by_key(|(key, _)| key.len()).map_or(&in_file, |(_, origin)| origin);
        error.from(origin)
    };
    let config: Config = serde_path_to_error::deserialize(Value::Table(table)).map_err(|error| {
        let mut why = error.inner().message().trim_end().replace('\n', " ");
        if why.starts_with("unknown field") {
            // serde goes on to list every key there is.
            why = "is not a key of this program".to_owned();
        }
        located(ConfigError::new(error.path().to_string(), why))
    })?;
    Settings::try_from(config).map_err(located)
}

/// A mistyped variable must not leave, say, discovery open to all.
fn refuse_unknown(names: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    for name in names {
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        // Kubernetes sets these in every pod beside a Service called turnpike-controller.
        let of_kubernetes = rest == "PORT" || rest.starts_with("PORT_") || rest.starts_with("SERVICE_");
        if !of_kubernetes && name != variable("config") && !KEYS.iter().any(|(key, ..)| variable(key) == name) {
            return Err(ConfigError::new(name, "is no variable of this program (--help lists them)"));
        }
    }
    Ok(())
}

fn flag(key: &str) -> String {
    key.replace(['.', '_'], "-")
}

fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "_").to_uppercase())
}

fn read(path: &Path) -> Result<Table, ConfigError> {
    let at = |why: String| ConfigError::new("config", why).from(format!("{}: ", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| at(format!("cannot be read: {error}")))?;
    toml::from_str(&text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        at(format!("line {line}: {}", error.message().replace('\n', " ")))
    })
}

fn value(form: Form, text: &str) -> Result<Value, String> {
    let toml = |text: &str| {
        let table: Table = toml::from_str(&format!("value = {text}"))
            .map_err(|error| format!("is not TOML: {}", error.message().replace('\n', " ")))?;
        table.get("value").cloned().ok_or_else(|| "is not one TOML value".to_owned())
    };
    match form {
        Form::Text => Ok(Value::String(text.to_owned())),
        Form::Number => {
            let number = text.trim().parse().map_err(|_| format!("{text:?} is not a whole number"))?;
            Ok(Value::Integer(number))
        }
        Form::List if !text.trim_start().starts_with('[') => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Ok(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()))
        }
        Form::Users if !text.trim_start().starts_with('[') => {
            let user = |pair: &str| {
                let (name, password) = pair.split_once(':').ok_or_else(|| format!("{pair:?} is not name:password"))?;
                let fields = [("username", name), ("password", password)];
                let fields = fields.map(|(key, value)| (key.to_owned(), Value::String(value.to_owned())));
                Ok(Value::Table(fields.into_iter().collect()))
            };
            let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
            pairs.map(user).collect::<Result<Vec<_>, String>>().map(Value::Array)
        }
        Form::List | Form::Users | Form::Toml => toml(text),
    }
}

fn set(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => drop(table.insert(key.to_owned(), value)),
        Some((outer, inner)) => {
            let outer = table.entry(outer).or_insert_with(|| Value::Table(Table::new()));
            if !outer.is_table() {
                // What the file has there is no table; the part given over it is.
                *outer = Value::Table(Table::new());
            }
            if let Value::Table(outer) = outer {
                outer.insert(inner.to_owned(), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::config::{LogFormat, StoreSettings};

    const GOOD: &str = r#"
        id = "c1"
        region = "eu"
        tls = { ca = "ca.pem", certificate = "c.pem", key = "c.key" }
        store = { kind = "embedded", path = "state" }
        distances = [{ from = "eu", to = "us", ms = 90 }]
    "#;

    #[test]
    fn defaults_are_those_of_a_laptop() {
        let settings = load_text(GOOD, &[]).expect("good");
        assert_eq!(settings.grpc.to_string(), "127.0.0.1:9443");
        assert_eq!(settings.http.to_string(), "127.0.0.1:8080");
        assert_eq!(settings.realm, "turnpike");
        assert_eq!(settings.lease.as_secs(), 5);
        assert_eq!(settings.credential_ttl.as_secs(), 86_400);
        assert_eq!(settings.terms.home, "eu");
        assert_eq!(settings.terms.distances.known("us", "eu"), Some(90));
        assert_eq!(settings.terms.thresholds.cpu_permille, 850);
        assert_eq!(settings.cors_origins, ["*"]);
        assert!(settings.api_keys.is_empty());
    }

    #[test]
    fn flags_override_the_file() {
        let flags = [
            "--http=127.0.0.1:9",
            "--store-kind=etcd",
            "--store={kind=\"embedded\"}",
            "--store-endpoints=http://a:2379, http://b:2379",
            "--store-user=u",
            "--store-password=p",
            "--api-keys=[\"a,b\"]",
            "--credential-ttl=60",
            "--log-format=json",
        ];
        let settings = load_text(GOOD, &flags).expect("good");
        assert_eq!(settings.http.port(), 9);
        assert_eq!(settings.api_keys, ["a,b"]);
        assert_eq!(settings.credential_ttl.as_secs(), 60);
        assert_eq!(settings.log_format, LogFormat::Json);
        let StoreSettings::Etcd { endpoints, user, prefix, .. } = settings.store else { panic!("not etcd") };
        assert_eq!(endpoints, ["http://a:2379", "http://b:2379"]);
        assert_eq!(user, Some(("u".to_owned(), "p".to_owned())));
        assert_eq!(prefix, "turnpike/");
    }

    #[test]
    fn what_is_wrong_is_one_line_with_the_key() {
        let cases: &[(&str, &str, &[&str], &str)] = &[
            ("unknown key", "grcp = 1", &[], "FILE: grcp: is not a key of this program"),
            (
                "unknown key in a table",
                "",
                &["--store={kind=\"embedded\", pth=1}"],
                "--store: store.pth: is not a key of this program",
            ),
            ("wrong type", "lease = \"x\"", &[], "FILE: lease: invalid type: string \"x\", expected u32"),
            ("out of range", "lease = 1", &[], "FILE: lease: must be 2 to 60 seconds"),
            ("flag out of range", "", &["--lease=1"], "--lease: lease: must be 2 to 60 seconds"),
            ("flag that is no number", "", &["--lease=x"], "--lease: lease: \"x\" is not a whole number"),
            ("no address", "http = \"here\"", &[], "FILE: http: invalid socket address syntax"),
            ("one port for two", "http = \"127.0.0.1:9443\"", &[], "FILE: http: must be another address than grpc"),
            ("name", "", &["--id=a/b"], "--id: id: \"a/b\" must be 1 to 63"),
            ("kind", "", &["--store-kind=files"], "--store-kind: store.kind: unknown variant `files`"),
            (
                "foreign key",
                "",
                &["--store-prefix=x/"],
                "--store-prefix: store.prefix: has no meaning for kind = \"embedded\"",
            ),
            (
                "half a pair",
                "",
                &["--store={kind=\"etcd\",endpoints=[\"http://a\"],user=\"u\"}"],
                "--store: store.password: missing",
            ),
            ("network", "denied_peers = [\"10.0.0.0/33\"]", &[], "FILE: denied_peers[0]: \"10.0.0.0/33\" is not"),
            ("origin", "cors_origins = [\"example.org\"]", &[], "FILE: cors_origins[0]: \"example.org\" is not"),
            ("syntax", "realm = ", &[], "FILE: config: line 8: "),
            ("log", "log = \"info,=\"", &[], "FILE: log: "),
            (
                "second distance",
                "",
                &["--distances=[{from=\"a\",to=\"b\",ms=1},{from=\"b\",to=\"a\",ms=2}]"],
                "--distances: distances[1]: gives a pair",
            ),
            ("nested type", "", &["--distances=[{from=\"a\",to=\"b\",ms=-1}]"], "--distances: distances[0].ms: "),
            ("retention", "", &["--usage-max-entries=0"], "--usage-max-entries: usage.max_entries: must be 1 to"),
            ("threshold", "overload = { cpu_permille = 1001 }", &[], "FILE: overload.cpu_permille: must be"),
            (
                "short console key",
                "console_keys = [{name=\"ann\",role=\"operator\",key=\"short\"}]",
                &[],
                "FILE: console_keys[0].key: must be 16 to 256 bytes",
            ),
            (
                "console role",
                "console_keys = [{name=\"ann\",role=\"king\",key=\"0123456789abcdef\"}]",
                &[],
                "FILE: console_keys[0].role: unknown variant `king`",
            ),
            (
                "user twice",
                "static_users = [{username=\"a\",password=\"b\"},{username=\"a\",password=\"c\"}]",
                &[],
                "FILE: static_users[1].username: is there twice",
            ),
        ];
        for (what, text, flags, expected) in cases {
            let error = load_text(&format!("{GOOD}\n{text}"), flags).err().expect(what).to_string();
            assert!(error.starts_with(expected), "{what}: {error:?} does not begin with {expected:?}");
            assert!(!error.contains('\n'), "{what}: {error:?} is more than a line");
        }
    }

    #[test]
    fn users_are_pairs() {
        let settings = load_text(GOOD, &["--static-users=alice:a:b, bob:c"]).expect("good");
        let users: Vec<_> = settings.static_users.iter().map(|user| (&*user.username, &*user.password)).collect();
        assert_eq!(users, [("alice", "a:b"), ("bob", "c")]);
        let error = load_text(GOOD, &["--static-users=alice"]).err().expect("no password").to_string();
        assert_eq!(error, "--static-users: static_users: \"alice\" is not name:password");
    }

    #[test]
    fn variables_nobody_knows_are_refused() {
        let refuse = |name: &str| refuse_unknown(std::iter::once(name.to_owned())).err().map(|error| error.key);
        for fine in ["PATH", "TURNPIKE_CONTROLLERS", "TURNPIKE_CONTROLLER_API_KEYS", "TURNPIKE_CONTROLLER_CONFIG"] {
            assert_eq!(refuse(fine), None);
        }
        for of_kubernetes in ["TURNPIKE_CONTROLLER_PORT_9443_TCP_ADDR", "TURNPIKE_CONTROLLER_SERVICE_HOST"] {
            assert_eq!(refuse(of_kubernetes), None);
        }
        assert_eq!(refuse("TURNPIKE_CONTROLLER_API_KEY").as_deref(), Some("TURNPIKE_CONTROLLER_API_KEY"));
    }

    #[test]
    fn what_is_needed_is_asked_for() {
        for key in ["id", "region", "tls.ca", "tls.certificate", "tls.key", "store.kind", "store.path"] {
            let mut table: Table = toml::from_str(GOOD).expect("good");
            match key.split_once('.') {
                None => drop(table.remove(key)),
                Some((outer, inner)) => drop(table[outer].as_table_mut().expect("a table").remove(inner)),
            }
            let error = load_text(&table.to_string(), &[]).err().expect(key).to_string();
            assert!(error.starts_with(&format!("FILE: {key}: missing")), "{key}: {error}");
        }
    }

    /// Loads `text` as the file, whose name is written FILE in messages.
    fn load_text(text: &str, flags: &[&str]) -> Result<Settings, ConfigError> {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(text.as_bytes()).expect("written");
        let path = file.path().to_str().expect("UTF-8").to_owned();
        let arguments = ["controller", "--config", &path].into_iter().chain(flags.iter().copied());
        load(&command().get_matches_from(arguments))
            .map_err(|error| ConfigError { origin: error.origin.replace(&path, "FILE"), ..error })
    }
}
