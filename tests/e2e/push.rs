//! Calls on the call page leave relays that drain or are gone, and stay where a relay only restarts: `/turnpike.js` in
//! real browsers behind NATs.

use std::fs;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use harness::call_page::{self, CallPage, call};
use harness::certificate::Authority;
use harness::chromium::{Browser, Surroundings, View};
use harness::cluster::{Cluster, Controller, HTTP, Relay, RelayOptions, Store, target_directory};
use harness::lab::NatLab;
use harness::{Scenario, eventually, run_within};

/// Longest a call may take to connect before it counts as failed.
const CONNECT: Duration = Duration::from_secs(20);

/// A controller with the call page, and a browser behind each NAT.
struct Stage {
    lab: NatLab,
    cluster: Cluster,
    controller: Controller,
    authority: Authority,
    url: String,
    alice: Browser,
    bob: Browser,
}

/// Names under which the relays' certificates are good.
const NAMES: [&str; 2] = ["eu-1.turn.test", "eu-2.turn.test"];

async fn stage(test: &Scenario) -> Result<(Stage, [harness::place::Place; 2])> {
    let lab = NatLab::start().await?;
    let mut cluster = Cluster::new(test.path())?;
    let place = lab.server("controller").await?;
    let controller = cluster.controller(&place, Store::Embedded, "").await?;
    let url = call_page::serve(&place, place.at(HTTP)).await?;
    let places = [lab.server("eu-1").await?, lab.server("eu-2").await?];
    let authority = Authority::new(test.path())?;
    let home = test.directory("home")?;
    authority.trust_in(&home).await?;
    let hosts = NAMES.iter().zip(&places).map(|(name, place)| ((*name).to_owned(), place.address)).collect();
    let around = Surroundings { home: Some(home), hosts };
    let alice = Browser::launch_with(&lab.alice().host(), test.path(), "alice", &around).await?;
    let bob = Browser::launch_with(&lab.bob().host(), test.path(), "bob", &around).await?;
    Ok((Stage { lab, cluster, controller, authority, url, alice, bob }, places))
}

impl Stage {
    async fn relay(&self, number: usize, place: &harness::place::Place) -> Result<Relay> {
        let id = format!("eu-{}", number + 1);
        let certificate = self.authority.issue(&id, &[NAMES[number]], &[place.address])?;
        let more = format!("certificates = [{}]\npublic_host = {:?}", certificate.entry(), NAMES[number]);
        let options = RelayOptions { listen: vec![("tls", 5349)], more, ..RelayOptions::in_region("eu") };
        self.cluster.relay(&id, place, &options).await
    }

    async fn call(&self, query: &str) -> Result<[CallPage; 2]> {
        call([&self.alice, &self.bob], &self.url, query, CONNECT).await
    }
}

/// A relay that drains is left by its TCP and TLS calls, by an ICE restart under media that go on; credentials that
/// have expired since the calls began are no hindrance, because others came in time.
#[test]
fn calls_leave_a_relay_that_drains() -> Result<()> {
    run_within(Duration::from_secs(240), async |test| {
        let (stage, [first, second]) = stage(test).await?;
        let _one = stage.relay(0, &first).await?;
        let mut ends = Vec::new();
        for transport in ["tcp", "tls"] {
            ends.extend(stage.call(&format!("room={transport}&transport={transport}&ttl=10")).await?);
        }
        let _two = stage.relay(1, &second).await?;
        for end in &ends {
            end.is_on("eu-1", CONNECT).await?;
            end.outlives_its_credentials(Duration::from_secs(30)).await?;
            end.gets_pictures(CONNECT).await?;
            test.figure("longest pause before, of the machine's own", format!("{:?}", end.longest_pause().await?));
            ensure!(end.restarts().await?.is_empty(), "restarted without a reason: {:?}", end.notices().await?);
            end.forget_pauses().await?;
        }

        let host = &stage.controller.place.host;
        let drained = stage.cluster.turnctl(host, &["drain", "eu-1", "--deadline", "20s"]).await?;
        ensure!(drained.status.success(), "turnctl drain: {}", String::from_utf8_lossy(&drained.stderr));
        for end in &ends {
            end.hears("draining", "eu-1", Duration::from_secs(5)).await?;
        }
        look_at(test, "call-draining", &ends[0]).await?;
        for end in &ends {
            end.is_on("eu-2", Duration::from_secs(20)).await?;
            end.gets_pictures(CONNECT).await?;
        }
        for pair in ends.chunks(2) {
            let mut restarts = 0;
            for end in pair {
                let (reasons, course, pause) = (end.restarts().await?, end.course().await?, end.longest_pause().await?);
                test.figure("longest pause of a call that left a draining relay", format!("{pause:?}"));
                ensure!(reasons.len() <= 1 && reasons.iter().all(|why| why == "draining"), "restarts: {reasons:?}");
                // About a second is the promise; a loaded machine holds pictures up without any relay's doing.
                ensure!(pause < Duration::from_secs(3), "no picture for {pause:?}");
                // The connection left behind may be told of as failed for a moment; the call goes on meanwhile.
                ensure!(!course.states.iter().any(|state| state == "interrupted"), "{:?}", course.states);
                restarts += reasons.len();
            }
            ensure!(restarts >= 1, "nobody restarted, yet the call moved");
        }
        for end in &ends {
            eventually("it is connected", CONNECT, async || {
                let states = end.course().await?.states;
                if states.last().is_some_and(|last| last == "connected") { Ok(()) } else { Err(anyhow!("{states:?}")) }
            })
            .await?;
        }
        look_at(test, "call-moved", &ends[0]).await?;
        Ok(())
    })
}

/// A relay killed and started again keeps its calls, and nobody restarts ICE; killed for good it is left once it is
/// lost and has been silent for 3 s.
#[test]
fn calls_stay_through_a_restart_and_leave_the_lost() -> Result<()> {
    run_within(Duration::from_secs(240), async |test| {
        let (stage, [first, second]) = stage(test).await?;
        let mut one = stage.relay(0, &first).await?;
        let ends = stage.call("room=udp&transport=udp").await?;
        let _two = stage.relay(1, &second).await?;
        let mut before = Vec::new();
        for end in &ends {
            end.is_on("eu-1", CONNECT).await?;
            before.push(end.course().await?);
        }

        one.kill()?;
        one.start().await?;
        for (end, before) in ends.iter().zip(&before) {
            end.hears("restored", "eu-1", Duration::from_secs(20)).await?;
            end.gets_pictures(CONNECT).await?;
            ensure!(end.course().await? == *before, "before {before:?}, after {:?}", end.course().await?);
            ensure!(end.restarts().await?.is_empty(), "{:?}", end.notices().await?);
            let pause = end.longest_pause().await?;
            test.figure("longest pause of a call whose relay was killed and started", format!("{pause:?}"));
            end.forget_pauses().await?;
        }

        one.kill()?;
        for end in &ends {
            end.hears("lost", "eu-1", Duration::from_secs(20)).await?;
        }
        for end in &ends {
            end.is_on("eu-2", Duration::from_secs(30)).await?;
            end.gets_pictures(CONNECT).await?;
            let (reasons, pause) = (end.restarts().await?, end.longest_pause().await?);
            test.figure("longest pause of a call whose relay was lost for good", format!("{pause:?}"));
            ensure!(reasons.len() <= 1 && reasons.iter().all(|why| why == "lost"), "restarts: {reasons:?}");
            // A lease of 5 s and 3 s of silence at the latest, and a new connection.
            ensure!(pause < Duration::from_secs(15), "no picture for {pause:?}");
        }
        ensure!(stage.lab.mappings_of_alice().await.is_ok(), "the lab is whole");
        Ok(())
    })
}

/// Screenshots for people to look at.
async fn look_at(test: &Scenario, name: &str, end: &CallPage) -> Result<()> {
    let directory = target_directory().join("screenshots");
    fs::create_dir_all(&directory)?;
    for (dark, scheme) in [(false, "light"), (true, "dark")] {
        let png = end.page.screenshot(View { width: 1280, height: 900, dark }).await?;
        fs::write(directory.join(format!("{name}-{scheme}.png")), &png)?;
    }
    test.figure("screenshots", directory.join(name).display());
    Ok(())
}
