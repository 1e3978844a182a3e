//! One module a family of commands: arguments, calls, views.

use std::time::Duration;

use turnpike_proto::v1::Transport;

use crate::connection::{Cluster, ConnectionOptions};
use crate::failure::Result;
use crate::output::{Output, View};

pub(crate) mod allocations;
pub(crate) mod audit;
pub(crate) mod backbone;
pub(crate) mod bench;
pub(crate) mod ca;
pub(crate) mod completions;
pub(crate) mod conform;
pub(crate) mod context;
pub(crate) mod discover;
pub(crate) mod drain;
pub(crate) mod events;
pub(crate) mod explain;
pub(crate) mod import;
pub(crate) mod keys;
pub(crate) mod nat;
pub(crate) mod netcheck;
pub(crate) mod nodes;
pub(crate) mod probe;
pub(crate) mod revoke;
pub(crate) mod status;
pub(crate) mod top;
pub(crate) mod usage;
pub(crate) mod version;

/// How often a watched view is fetched anew: relays report each second.
const PERIOD: Duration = Duration::from_secs(1);

/// Shows what `fetch` gives, again and again. After the first success a controller that goes away is waited for.
async fn watch<V: View>(
    connection: &ConnectionOptions,
    output: Output,
    fetch: impl AsyncFn(&Cluster) -> Result<V>,
) -> Result {
    let mut cluster = connection.connect().await?;
    output.show_again(&fetch(&cluster).await?)?;
    let mut connected = true;
    loop {
        tokio::time::sleep(PERIOD).await;
        let fetched = async {
            if !connected {
                cluster = connection.connect().await?;
            }
            fetch(&cluster).await
        };
        match fetched.await {
            Ok(view) => {
                connected = true;
                output.show_again(&view)?;
            }
            Err(failure) if failure.is_passing() => {
                if connected {
                    output.note(&format!("{failure}; trying on"));
                }
                connected = false;
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// The name of a transport, as URIs and options write it.
fn transport_name(transport: i32) -> &'static str {
    match Transport::try_from(transport) {
        Ok(Transport::Udp) => "udp",
        Ok(Transport::Tcp) => "tcp",
        Ok(Transport::Tls) => "tls",
        Ok(Transport::Dtls) => "dtls",
        Ok(Transport::Unspecified) | Err(_) => "unknown",
    }
}
