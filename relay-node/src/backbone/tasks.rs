//! What runs on the backbone's thread: one task moves packets from workers to links, one per link dials, one per link
//! sends what had to wait, one per socket takes in whoever connects, one looks after all links.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn::Endpoint;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_local;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use turn_core::MemberId;

use super::detour::Detour;
use super::hub::Hub;
use super::link::{Link, Next};
use super::members::MemberList;
use super::outbox::Inbox;
use super::tls::Tls;
use crate::control::backoff::Backoff;
use crate::sys::epoll::Waker;

/// How often links are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Looks between reports.
const LOOKS_PER_REPORT: u32 = 10;
/// Looks between choices of ways: each compares every way over a third member to every member.
const LOOKS_PER_CHOICE: u32 = 2;
/// How long the relay that is dialled waits for the other one before it dials itself: it may be that only it can.
const COURTESY: Duration = Duration::from_millis(1500);
/// How long connections have to say that they end.
const ENDING: Duration = Duration::from_millis(300);

/// What the thread is told from outside.
pub(super) struct Orders {
    pub(super) members: watch::Receiver<Arc<MemberList>>,
    pub(super) tls: watch::Receiver<Tls>,
    pub(super) stop: oneshot::Receiver<()>,
}

/// Runs until it is told to stop.
pub(super) async fn run(hub: Rc<Hub>, inboxes: Vec<Inbox>, waker: Arc<Waker>, mut orders: Orders) {
    match waker.bell() {
        Ok(bell) => {
            spawn_local(pump(Rc::clone(&hub), inboxes, waker, bell));
        }
        Err(error) => {
            tracing::error!("the backbone cannot be woken by workers: {error}");
            return;
        }
    }
    for endpoint in hub.endpoints.all() {
        spawn_local(accept(Rc::clone(&hub), endpoint.clone()));
    }
    spawn_local(look(Rc::clone(&hub)));
    spawn_local(detours(Rc::clone(&hub)));
    orders.members.mark_changed();
    let mut members_may_change = true;
    let mut tls_may_change = true;
    loop {
        tokio::select! {
            changed = orders.members.changed(), if members_may_change => {
                members_may_change = changed.is_ok();
                let list = Arc::clone(&orders.members.borrow_and_update());
                for link in hub.set_members(&list) {
                    spawn_local(dial(Rc::clone(&hub), Rc::clone(&link)));
                    spawn_local(send(Rc::clone(&hub), link));
                }
            }
            changed = orders.tls.changed(), if tls_may_change => {
                tls_may_change = changed.is_ok();
                if tls_may_change {
                    let tls = orders.tls.borrow_and_update().clone();
                    hub.set_tls(tls);
                }
            }
            _ = &mut orders.stop => break,
        }
    }
    for endpoint in hub.endpoints.all() {
        endpoint.close(0u32.into(), b"it ended");
    }
    let said = async {
        for endpoint in hub.endpoints.all() {
            endpoint.wait_idle().await;
        }
    };
    // Those who do not hear it find out by themselves.
    let _ = timeout(ENDING, said).await;
}

/// Moves packets from workers to links, batch by batch.
async fn pump(hub: Rc<Hub>, mut inboxes: Vec<Inbox>, waker: Arc<Waker>, bell: AsyncFd<OwnedFd>) {
    let mut memory = BytesMut::new();
    let mut touched = Vec::new();
    loop {
        hub.drain(&mut inboxes, &mut memory, &mut touched);
        waker.doze();
        if !inboxes.iter().all(Inbox::is_empty) {
            waker.rise();
            // QUIC sends what it was given before more is taken.
            tokio::task::yield_now().await;
            continue;
        }
        let Ok(mut ready) = bell.readable().await else { return };
        // Each wake-up is told of by itself: what was written need not be read.
        ready.clear_ready();
        waker.rise();
    }
}

/// Sends what waits for a link, as QUIC and the link's rate allow.
async fn send(hub: Rc<Hub>, link: Rc<Link>) {
    loop {
        match link.flush_and_wait(Instant::now()) {
            Next::Idle => link.kick.notified().await,
            Next::Wait(wait) => sleep(wait).await,
            Next::Full(connection, datagram) => {
                // The error of a connection that has ended is told where it is read.
                let _ = connection.send_datagram_wait(datagram).await;
            }
        }
        if !hub.is_current(&link) {
            return;
        }
    }
}

/// Keeps a link connected.
async fn dial(hub: Rc<Hub>, link: Rc<Link>) {
    let mut backoff = Backoff::default();
    let mut was_connected = false;
    while hub.is_current(&link) {
        if !link.wants_dialling(Instant::now()) {
            if !was_connected {
                was_connected = true;
                backoff = Backoff::default();
            }
            link.redial.notified().await;
            continue;
        }
        if !link.dials_first() && !link.is_connected() {
            let _ = timeout(COURTESY, link.redial.notified()).await;
            if !link.wants_dialling(Instant::now()) || !hub.is_current(&link) {
                continue;
            }
        }
        was_connected = false;
        dial_once(&hub, &link).await;
        if link.wants_dialling(Instant::now()) {
            let _ = timeout(backoff.next(), link.redial.notified()).await;
        }
    }
}

/// Tries a member's addresses in their order.
async fn dial_once(hub: &Rc<Hub>, link: &Rc<Link>) {
    let addresses = link.member().addresses.clone();
    if addresses.is_empty() && !link.is_connected() {
        link.set_why("has no address");
    }
    for address in addresses {
        let tls = hub.tls.borrow().clone();
        let tried = match hub.endpoints.dial(address, &tls, hub.kind_of(address)).await {
            Ok(connection) => hub.adopt(connection, Some(link.id)),
            Err(why) => Err(why),
        };
        match tried {
            Ok(()) => return,
            Err(why) if !link.is_connected() => link.set_why(why),
            Err(_) => {}
        }
        if !link.wants_dialling(Instant::now()) || !hub.is_current(link) {
            return;
        }
    }
}

/// Makes a connection to a member over another one.
async fn dial_detour(hub: Rc<Hub>, link: Rc<Link>, via: MemberId) {
    let tls = hub.tls.borrow().clone();
    let tried = match hub.endpoints.dial_detour(Detour { via, far: link.id }, &tls).await {
        Ok(connection) => hub.adopt(connection, Some(link.id)),
        Err(why) => Err(why),
    };
    if let Err(why) = tried {
        tracing::debug!(member = %link.member().node_id, why, "a detour cannot be had");
        link.no_detour();
    }
}

/// Sends the packets of connections over third members.
async fn detours(hub: Rc<Hub>) {
    loop {
        hub.crossing.sends.notified().await;
        hub.send_detours();
    }
}

/// Takes in whoever connects. Handshakes are tasks of their own.
async fn accept(hub: Rc<Hub>, endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        let Some((incoming, place)) = hub.endpoints.admit(incoming, |ip| hub.is_of_member(ip)) else { continue };
        let hub = Rc::clone(&hub);
        spawn_local(async move {
            let remote = incoming.remote_address();
            let tls = hub.tls.borrow().clone();
            let refused = match place.handshake(incoming, &tls, hub.kind_of(remote)).await {
                Ok(connection) => hub.adopt(connection, None).err().map(str::to_owned),
                Err(error) => Some(error.to_string()),
            };
            if let Some(why) = refused {
                tracing::debug!(%remote, why, "a connection to the backbone was refused");
            }
        });
    }
}

/// Looks after all links.
async fn look(hub: Rc<Hub>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for tick in (0..LOOKS_PER_REPORT).cycle() {
        ticks.tick().await;
        let (has_failed, has_turned) = hub.look(Instant::now());
        if tick == 0 {
            hub.tell_distances();
        }
        if tick % LOOKS_PER_CHOICE == 0 || has_failed {
            for (link, via) in hub.choose_paths(Instant::now()) {
                spawn_local(dial_detour(Rc::clone(&hub), link, via));
            }
        }
        if tick == 0 || has_turned {
            hub.report();
        }
    }
}
