//! Starts the backbone beside the data plane, and renews its certificate.

use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::Context;
use tokio::time::{MissedTickBehavior, interval};

use super::Control;
use crate::backbone::{self, Backbone, Identity};
use crate::config::{Controllers, Settings};
use crate::dataplane::Dataplane;
use crate::metrics;

/// Between two readings of the links for metrics.
const PUBLISH: Duration = Duration::from_secs(1);
/// Between two looks at the files of the certificate.
const LOOK: Duration = Duration::from_secs(5);

/// Links this relay to the members that its controller lists, if it is to be. They end with what is returned.
///
/// # Errors
/// One line that names the key: an address that cannot be bound, or a certificate that is of no use.
pub fn link_up(
    settings: &Settings,
    control: &mut Control,
    dataplane: &Dataplane,
) -> anyhow::Result<Option<Arc<Backbone>>> {
    let (Some(wanted), Some(controllers)) = (&settings.backbone, &settings.controllers) else {
        return Ok(None);
    };
    let identity = identity(controllers)?;
    let links = backbone::Settings {
        node_id: settings.node_id.clone(),
        listen: wanted.listen.clone(),
        relay_ips: settings.relay_ips.iter().map(|ip| ip.advertised).collect(),
        private_networks: wanted.private_networks.clone(),
        capacity: wanted.capacity,
        plain_udp: !settings.cluster_only,
    };
    let started = Backbone::start(links, &identity, control.members(), dataplane.workers(), dataplane.delivery());
    let (backbone, outboxes) = started.context("backbone")?;
    dataplane.join_backbone(outboxes, &backbone.usabilities(), &control.lookups());
    let backbone = Arc::new(backbone);
    control.report_on(Arc::clone(&backbone));
    tokio::spawn(publish(Arc::downgrade(&backbone)));
    tokio::spawn(renew(Arc::downgrade(&backbone), controllers.clone(), identity));
    Ok(Some(backbone))
}

fn identity(controllers: &Controllers) -> Result<Identity, crate::config::ConfigError> {
    let pem = controllers.read_identity()?;
    Ok(Identity { ca: pem.ca, certificate: pem.certificate, key: pem.key })
}

/// Shows every link in the metrics, each second; ends with the backbone.
async fn publish(backbone: Weak<Backbone>) {
    let mut ticks = interval(PUBLISH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(backbone) = backbone.upgrade() else { return };
        metrics::backbone(&backbone.report());
    }
}

/// Takes a replaced certificate into use; ends with the backbone.
async fn renew(backbone: Weak<Backbone>, controllers: Controllers, mut current: Identity) {
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let from = controllers.clone();
        // The runtime ends.
        let Ok(read) = tokio::task::spawn_blocking(move || identity(&from)).await else { return };
        let Some(backbone) = backbone.upgrade() else { return };
        // Files that are being written are read again soon.
        let Ok(read) = read else { continue };
        if read == current {
            continue;
        }
        match backbone.renew(&read) {
            Ok(()) => tracing::info!("the backbone uses the new certificate"),
            Err(error) => tracing::error!("the backbone keeps its certificate: {error}"),
        }
        // One that is refused is refused once.
        current = read;
    }
}
