//! "Test my connection" on the call page, in a real browser behind real NATs: what it says is what they are. `turnctl nat` beside
//! it in `nat_kinds.rs`.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::call_page;
use harness::chromium::{Browser, Page};
use harness::cluster::{Cluster, HTTP, RelayOptions, Store};
use harness::lab::NatLab;
use harness::{Scenario, run_within};
use patchbay::{NatConfig, NatFiltering, NatMapping};
use serde_json::Value;

/// Longest wait for the page and for its verdict, which takes four seconds where something is blocked.
const PATIENCE: Duration = Duration::from_secs(30);

fn nat(mapping: NatMapping) -> Result<NatConfig> {
    Ok(NatConfig::builder().mapping(mapping).filtering(NatFiltering::AddressAndPortDependent).build()?)
}

/// A NAT with one mapping for all, a symmetric one, UDP blocked, only port 443: the page names each, in its words and for
/// programs.
#[test]
fn the_page_names_what_the_network_does() -> Result<()> {
    run_within(Duration::from_secs(180), async |test: &Scenario| {
        let lab = NatLab::start().await?;
        let mut cluster = Cluster::new(test.path())?;
        let controller = lab.server("controller").await?;
        let _controller = cluster.controller(&controller, Store::Embedded, "").await?;
        let (eu, us) = (lab.server("eu-1").await?, lab.server("us-1").await?);
        let options = RelayOptions { listen: vec![("tcp", 443)], ..RelayOptions::in_region("eu") };
        let _eu = cluster.relay("eu-1", &eu, &options).await?;
        // A second destination: whether a NAT gives each another port takes two.
        let _us = cluster.relay("us-1", &us, &RelayOptions::in_region("us")).await?;
        let site = lab.server("page").await?;
        let url = call_page::serve(&site, controller.at(HTTP)).await?;
        let alice = lab.alice();
        alice.behind(nat(NatMapping::EndpointIndependent)?).await?;
        let browser = Browser::launch(&alice.host(), test.path(), "alice").await?;
        let page = browser.open(&url).await?;

        let said = tested(&page, &url).await?;
        ensure!(said["kind"] == "cone" && said["mapping"] == "endpoint-independent", "{said}");
        ensure!(shown(&page).await?.contains("one outside port for all destinations"), "{said}");
        ensure!(said["ways"].as_array().is_some_and(|ways| ways.iter().any(|it| it["port"] == 443)), "{said}");
        ensure!(said["ways"].as_array().is_some_and(|ways| ways.iter().all(|it| it["works"] == true)), "{said}");

        alice.behind(nat(NatMapping::EndpointDependent)?).await?;
        let said = tested(&page, &url).await?;
        ensure!(said["kind"] == "symmetric" && said["mapping"] == "address-dependent", "{said}");
        let words = shown(&page).await?;
        ensure!(words.contains("symmetric") && words.contains("another outside port for each destination"), "{words}");

        alice.block_udp(true).await?;
        let said = tested(&page, &url).await?;
        ensure!(said["kind"] == "udp-blocked" && said["mapping"] == "unknown", "{said}");
        let words = shown(&page).await?;
        ensure!(words.contains("UDP is blocked") && words.contains("UDP 3478\tblocked"), "{words}");
        ensure!(words.contains("TCP 3478\tgets through"), "{words}");

        alice.only(&[("tcp", eu.at(443)), ("tcp", site.at(call_page::PORT))]).await?;
        let said = tested(&page, &url).await?;
        ensure!(said["kind"] == "only-443", "{said}");
        let words = shown(&page).await?;
        ensure!(words.contains("Only port 443 gets through") && words.contains("TCP 443\tgets through"), "{words}");
        ensure!(words.contains("TCP 3478\tblocked"), "{words}");
        Ok(())
    })
}

/// Loads the page anew, as connections of before the change are lost, presses the button, and waits for the verdict.
async fn tested(page: &Page, url: &str) -> Result<Value> {
    page.navigate(url).await?;
    page.wait_for("window.turnpike && document.querySelector('#room').value !== ''", PATIENCE).await?;
    page.click("#test").await?;
    page.wait_for("turnpike.network && !document.querySelector('#test').disabled", PATIENCE).await?;
    page.evaluate("turnpike.network").await
}

/// What stands in the panel: names and values of the lists by a tab.
async fn shown(page: &Page) -> Result<String> {
    page.evaluate(
        "document.querySelector('#network-headline').textContent + ' ' + document.querySelector('#network-advice').textContent \
         + [...document.querySelectorAll('#network-ways div')].map((d) => '\\n' + [...d.children].map((c) => c.textContent).join('\\t')).join('')",
    )
    .await
}
