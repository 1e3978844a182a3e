//! The table `kubernetes`: what a relay in a pod asks the API server.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use hyper::Uri;
use serde::Deserialize;

use super::{Config, ConfigError};
use crate::kubernetes::{self, Facts};

/// Where a pod finds its service account's token, authority and namespace.
const CREDENTIALS: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The written form. Its default asks nobody.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WrittenKubernetes {
    /// The Node this relay runs on: its region, zone and public address are this relay's where none are configured, and
    /// a cordon of it drains this relay.
    pub node: String,
    /// The Service of the controllers, `NAMESPACE/NAME`; its ready endpoints (port `grpc`) are joined.
    pub controllers: String,
    /// The Service, of this pod's namespace, whose load balancer's address is the public one.
    pub service: String,
    /// A Node without an external address is reached by its internal one.
    pub internal: bool,
    /// The API server, `https://HOST:PORT`; found from the pod's environment where it is empty.
    pub api: String,
    /// Directory of the service account: `token`, `ca.crt`, `namespace`.
    pub credentials: PathBuf,
}

/// The checked form.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KubernetesSettings {
    /// The Node that is read and watched.
    pub node: Option<String>,
    /// Namespace and name of the controllers' Service.
    pub controllers: Option<(String, String)>,
    /// The Service with the public address.
    pub service: Option<String>,
    /// Whether an internal address will do.
    pub internal: bool,
    /// The API server.
    pub api: Uri,
    /// Directory of the service account.
    pub credentials: PathBuf,
}

impl WrittenKubernetes {
    /// None where nothing is to be asked.
    pub(super) fn check(&self) -> Result<Option<KubernetesSettings>, ConfigError> {
        let wrong = |key: &str, problem: String| ConfigError::new(format!("kubernetes.{key}"), problem);
        let name = |key: &str, text: &str| {
            let is_good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
            if text.len() > 253 || !text.chars().all(is_good) {
                return Err(wrong(key, format!("{text:?} is no name of an object")));
            }
            Ok(Some(text.to_owned()).filter(|text| !text.is_empty()))
        };
        let node = name("node", &self.node)?;
        let service = name("service", &self.service)?;
        let controllers = match self.controllers.split_once('/') {
            None if self.controllers.is_empty() => None,
            Some((namespace, service)) if !namespace.is_empty() && !service.is_empty() => {
                name("controllers", namespace)?.zip(name("controllers", service)?)
            }
            _ => {
                let problem = format!("{:?} is no Service; write it as NAMESPACE/NAME", self.controllers);
                return Err(wrong("controllers", problem));
            }
        };
        if node.is_none() && service.is_none() && controllers.is_none() {
            return Ok(None);
        }
        let api = if self.api.is_empty() { from_environment() } else { self.api.clone() };
        if api.is_empty() {
            let problem =
                "missing: KUBERNETES_SERVICE_HOST and _PORT are not set, so this is no pod; write https://HOST:PORT";
            return Err(wrong("api", problem.into()));
        }
        let uri: Option<Uri> = api.parse().ok();
        let uri = uri.filter(|uri| uri.scheme_str() == Some("https") && uri.host().is_some());
        let api = uri.ok_or_else(|| wrong("api", format!("{api:?} is no address; write https://HOST:PORT")))?;
        let credentials =
            if self.credentials.as_os_str().is_empty() { CREDENTIALS.into() } else { self.credentials.clone() };
        Ok(Some(KubernetesSettings { node, controllers, service, internal: self.internal, api, credentials }))
    }
}

/// Asks before there is anything else; blocks.
pub(super) fn find(settings: &KubernetesSettings, state_dir: &Path) -> Result<Facts, ConfigError> {
    let wrong = |problem: String| ConfigError::new("kubernetes", problem);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| wrong(error.to_string()))?;
    runtime.block_on(kubernetes::find(settings, state_dir)).map_err(|error| wrong(error.to_string()))
}

fn from_environment() -> String {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    match (variable("KUBERNETES_SERVICE_HOST"), variable("KUBERNETES_SERVICE_PORT")) {
        (host, port) if host.is_empty() || port.is_empty() => String::new(),
        (host, port) if host.contains(':') => format!("https://[{host}]:{port}"),
        (host, port) => format!("https://{host}:{port}"),
    }
}

impl Config {
    /// Fills in what is not configured.
    pub(super) fn adopt(&mut self, settings: &KubernetesSettings, facts: &Facts) {
        let fill = |key: &mut String, found: &Option<String>| {
            if let Some(found) = found.as_ref().filter(|_| key.is_empty()) {
                key.clone_from(found);
            }
        };
        fill(&mut self.region, &facts.region);
        fill(&mut self.zone, &facts.zone);
        self.public_ip = self.public_ip.or(facts.public_ip);
        self.public_ip6 = self.public_ip6.or(facts.public_ip6);
        if let Some((namespace, service)) = &settings.controllers {
            if !facts.controllers.is_empty() {
                self.controllers.clone_from(&facts.controllers);
            } else if self.controllers.is_empty() {
                // None is ready yet. Where there is DNS, this is found before the next look.
                self.controllers = vec![format!("https://{service}.{namespace}.svc:9443")];
            }
        }
    }
}

/// Where the controllers are: configured once, or found anew while the relay runs. Never empty. Clones are the same.
#[derive(Clone, Debug)]
pub struct Endpoints(Arc<ArcSwap<Vec<String>>>);

impl Endpoints {
    /// At first.
    pub(super) fn new(endpoints: Vec<String>) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(endpoints)))
    }

    /// As known now.
    pub fn now(&self) -> Arc<Vec<String>> {
        self.0.load_full()
    }

    /// They are elsewhere; nothing is done by an empty list.
    pub fn replace(&self, endpoints: Vec<String>) {
        if !endpoints.is_empty() && *self.now() != endpoints {
            tracing::info!(controllers = endpoints.join(","), "the controllers are found elsewhere");
            self.0.store(Arc::new(endpoints));
        }
    }
}

impl PartialEq for Endpoints {
    fn eq(&self, other: &Self) -> bool {
        self.now() == other.now()
    }
}

impl Eq for Endpoints {}
