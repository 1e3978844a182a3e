//! Whether what `deploy/` says holds for the binaries as they are: configurations in the manifests, metrics in catalogue,
//! dashboards and alerts, commands in the documentation, coturn's file imported.

#[path = "../../relay-node/tests/kubernetes/api.rs"]
#[allow(dead_code, reason = "the tests of the relay use more of it")]
mod api;
mod catalogue;
mod documents;
mod import;
mod manifests;
mod members;
mod rehearsal;
