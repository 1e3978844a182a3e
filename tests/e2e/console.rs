//! The console under the hands of an operator: by mouse, by keyboard alone, on a screen and on a phone.

use std::fs;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use harness::chromium::{Browser, Page, View};
use harness::cluster::{Cluster, HTTP, RelayOptions, Store, target_directory};
use harness::picture::Picture;
use harness::place::Place;
use harness::{Host, call_page, eventually, run_within};
use serde_json::Value;

use crate::steering::{handed_out, until_handed_out};

/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);
/// WCAG 2.2, 1.4.3.
const CONTRAST: f64 = 4.5;
const OPERATOR: &str = "an operator's key, long enough";
const VIEWER: &str = "a viewer's key, long enough";

/// One operator at the console of three relays that carry a call: looks without a key and may not act; signs in, drains a relay
/// by its button, which discovery then leaves out, and takes that back; finds the call; asks why a client is sent where; all is
/// in the audit log. The same by keyboard alone. Readable and without sideways scrolling on a phone.
#[test]
fn an_operator_runs_the_cluster_from_the_console() -> Result<()> {
    run_within(Duration::from_secs(240), async |test| {
        let mut cluster = Cluster::new(test.path())?;
        let more = format!(
            "console_keys = [{{ name = \"olga\", role = \"operator\", key = {OPERATOR:?} }}, \
             {{ name = \"vera\", role = \"viewer\", key = {VIEWER:?} }}]\n\
             log_format = \"json\"\n\
             distances = [{{ from = \"eu\", to = \"us\", ms = 90 }}]\n\
             regions = [{{ name = \"eu\", latitude = 50.1, longitude = 8.7 }}, {{ name = \"us\", latitude = 39.0, longitude = -77.5 }}]"
        );
        let controller_place = Place::on_loopback(2);
        let controller = cluster.controller(&controller_place, Store::Embedded, &more).await?;
        let mut relays = Vec::new();
        for (id, region, n) in [("eu-1", "eu", 11), ("eu-2", "eu", 12), ("us-1", "us", 13)] {
            let options = RelayOptions { more: "backbone = {}".to_owned(), ..RelayOptions::in_region(region) };
            relays.push(cluster.relay(id, &Place::on_loopback(n), &options).await?);
        }
        until_handed_out(&controller, &["eu-1", "eu-2", "us-1"], PATIENCE).await?;
        let browser = Browser::launch(&Host::Machine, test.path(), "browser").await?;
        let site = call_page::serve(&Place::on_loopback(3), controller_place.at(HTTP)).await?;
        let query = "room=console-call&transport=udp";
        let [_alice, _bob] = call_page::call([&browser, &browser], &site, query, PATIENCE * 2).await?;

        let page = browser.open(&format!("http://{}/console", controller_place.at(HTTP))).await?;
        page.focus().await?;
        page.wait_for("document.querySelectorAll('.relay').length === 3", PATIENCE).await?;
        page.wait_for("document.querySelectorAll('#mesh-map line').length === 3", PATIENCE).await?;
        // Who only looks sees why the buttons are off.
        page.wait_for("document.querySelector('#may-not').textContent.includes('key of an operator')", PATIENCE)
            .await?;
        ensure!(
            page.evaluate::<bool>("[...document.querySelectorAll('.relay .act button')].every((b) => b.disabled)")
                .await?
        );
        sign_in(&page, "no such key at all").await?;
        page.wait_for("document.querySelector('#sign-in-problem').textContent === 'Nobody has this key.'", PATIENCE)
            .await?;
        page.press("Escape").await?;
        sign_in(&page, VIEWER).await?;
        page.wait_for("document.querySelector('#who').textContent === 'vera · viewer'", PATIENCE).await?;
        ensure!(
            page.evaluate::<bool>("[...document.querySelectorAll('.relay .act button')].every((b) => b.disabled)")
                .await?
        );
        page.click("#sign-out").await?;
        sign_in(&page, OPERATOR).await?;
        page.wait_for("document.querySelector('#who').textContent === 'olga · operator'", PATIENCE).await?;

        let drain = "button[aria-label='Drain eu-2']";
        page.wait_for(&format!("document.querySelector({drain:?})?.disabled === false"), PATIENCE).await?;
        page.click(drain).await?;
        page.wait_for("document.querySelector('#drain-title').textContent === 'Drain eu-2'", PATIENCE).await?;
        look_at("console-drain", &page, &VIEWS[..1]).await?;
        page.evaluate::<bool>("(document.querySelector('#drain-deadline').value = '600') === '600'").await?;
        page.click("#drain-confirm").await?;
        page.wait_for("!document.querySelector('#drain-dialog').open", PATIENCE).await?;
        let left = handed_out(&controller, "eu").await?;
        ensure!(left.iter().eq(["eu-1", "us-1"]), "after the dialog has closed discovery hands out {left:?}");
        let uncordon = "button[aria-label='Uncordon eu-2']";
        page.wait_for(&format!("!!document.querySelector({uncordon:?})"), PATIENCE).await?;
        page.wait_for("[...document.querySelectorAll('.pill')].some((p) => p.textContent === 'draining')", PATIENCE)
            .await?;
        page.wait_for(
            "document.querySelector('#actions').textContent.includes('operator/olga drained eu-2')",
            PATIENCE,
        )
        .await?;
        search_and_explain(&page).await?;
        look_at("console", &page, &VIEWS).await?;
        page.click(uncordon).await?;
        until_handed_out(&controller, &["eu-1", "eu-2", "us-1"], PATIENCE).await?;
        page.wait_for(
            "document.querySelector('#actions').textContent.includes('operator/olga uncordoned eu-2')",
            PATIENCE,
        )
        .await?;

        last_of_its_region(&page).await?;
        by_keyboard(&browser, &format!("http://{}/console", controller_place.at(HTTP))).await?;
        let nodes = cluster.turnctl_json(&Host::Machine, &["nodes"]).await?;
        ensure!(nodes["nodes"].as_array().is_some_and(|all| all.iter().all(|node| node["drain"].is_null())), "{nodes}");
        let audit = cluster.turnctl_json(&Host::Machine, &["audit"]).await?;
        let actions = audit["actions"].as_array().map_or(0, Vec::len);
        ensure!(actions == 7, "three drains, a refused one and three taken back: {audit}");
        logged(&fs::read_to_string(test.file("controller-1.log"))?)
    })
}

/// The same seven in the log of the controller, which is of JSON: when, who, by what, what, on what, how it ended.
fn logged(log: &str) -> Result<()> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let audit: Vec<Value> = lines.filter(|line| line["target"] == "audit").collect();
    ensure!(audit.len() == 7, "{audit:#?}");
    let is = |line: &Value, action: &str, on: &str, outcome: &str| {
        let fields = &line["fields"];
        line["timestamp"].is_string()
            && fields["caller"] == "operator/olga"
            && fields["via"] == "console"
            && (&fields["action"], &fields["on"], &fields["outcome"]) == (&action.into(), &on.into(), &outcome.into())
    };
    let told = [
        ("drain", "eu-2", "done"),
        ("uncordon", "eu-2", "done"),
        ("drain", "us-1", "failed"),
        ("drain", "us-1", "done"),
        ("uncordon", "us-1", "done"),
        ("drain", "eu-1", "done"),
        ("uncordon", "eu-1", "done"),
    ];
    let as_told = audit.iter().zip(told).all(|(line, (action, on, outcome))| is(line, action, on, outcome));
    ensure!(as_told, "{audit:#?}");
    Ok(())
}

async fn sign_in(page: &Page, key: &str) -> Result<()> {
    page.wait_for("!document.querySelector('#sign-in').hidden", PATIENCE).await?;
    page.click("#sign-in").await?;
    page.wait_for("document.activeElement.id === 'key'", PATIENCE).await?;
    page.write(key).await?;
    page.press("Enter").await
}

/// The call is found by its room, which is its user; nothing by nonsense; and why a client in `us` goes where.
async fn search_and_explain(page: &Page) -> Result<()> {
    page.click("#filter").await?;
    page.write("no such call").await?;
    page.wait_for(
        "document.querySelector('#no-allocations').textContent.startsWith('No allocation has this')",
        PATIENCE,
    )
    .await?;
    page.evaluate::<bool>("(document.querySelector('#filter').select(), true)").await?;
    page.write("console-CALL").await?;
    let found = "[...document.querySelectorAll('#allocations tr')].filter((r) => r.cells[0].textContent === 'console-call').length >= 2";
    page.wait_for(found, PATIENCE).await?;
    page.wait_for("/^[0-9]+ found$/.test(document.querySelector('#allocations-note').textContent)", PATIENCE).await?;
    page.click("#explain input[name=client]").await?;
    page.write("203.0.113.7").await?;
    page.evaluate::<bool>("(document.querySelector('#explain select[name=region]').value = 'us') === 'us'").await?;
    page.click("#explain button").await?;
    let verdict = "document.querySelector('#explain-verdict').textContent";
    page.wait_for(&format!("{verdict}.startsWith('A client at 203.0.113.7 is sent to us-1')"), PATIENCE).await?;
    let rows: Vec<String> =
        page.evaluate("[...document.querySelectorAll('#considered tr')].map((r) => r.cells[6].textContent)").await?;
    ensure!(rows.len() == 3 && rows[0].starts_with("chosen, place 1"), "{rows:?}");
    ensure!(rows.iter().any(|why| why.contains("left out: draining")), "{rows:?}");
    Ok(())
}

/// What would leave a region without a relay is refused with the reason, done when it is insisted on, and taken back.
async fn last_of_its_region(page: &Page) -> Result<()> {
    page.click("button[aria-label='Drain us-1']").await?;
    page.wait_for("document.querySelector('#drain-dialog').open", PATIENCE).await?;
    page.click("#drain-confirm").await?;
    let problem = "document.querySelector('#drain-problem').textContent";
    page.wait_for(&format!("{problem}.includes('region us would have no ready relay left')"), PATIENCE).await?;
    page.click("#drain-force-row").await?;
    page.click("#drain-confirm").await?;
    page.wait_for("!document.querySelector('#drain-dialog').open", PATIENCE).await?;
    page.wait_for("!!document.querySelector(\"button[aria-label='Uncordon us-1']\")", PATIENCE).await?;
    page.click("button[aria-label='Uncordon us-1']").await?;
    page.wait_for("!!document.querySelector(\"button[aria-label='Drain us-1']\")", PATIENCE).await
}

/// In another window, without a mouse: sign in, drain, take it back. Every stop on the way shows its focus.
async fn by_keyboard(browser: &Browser, url: &str) -> Result<()> {
    let page = browser.open(url).await?;
    page.focus().await?;
    page.wait_for("document.querySelectorAll('.relay').length === 3", PATIENCE).await?;
    page.wait_for("!document.querySelector('#sign-in').hidden", PATIENCE).await?;
    page.tab_to("#sign-in").await?;
    page.press("Enter").await?;
    page.wait_for("document.activeElement.id === 'key'", PATIENCE).await?;
    page.write(OPERATOR).await?;
    page.press("Enter").await?;
    page.wait_for("document.querySelector(\"button[aria-label='Drain eu-1']\")?.disabled === false", PATIENCE).await?;
    page.tab_to("button[aria-label='Drain eu-1']").await?;
    page.press("Enter").await?;
    page.wait_for("document.querySelector('#drain-dialog').open", PATIENCE).await?;
    page.tab_to("#drain-confirm").await?;
    page.press("Space").await?;
    page.wait_for("!document.querySelector('#drain-dialog').open", PATIENCE).await?;
    // The focus is where it was, on what the button has become.
    page.wait_for("document.activeElement.getAttribute('aria-label') === 'Uncordon eu-1'", PATIENCE).await?;
    page.press("Enter").await?;
    page.wait_for("document.activeElement.getAttribute('aria-label') === 'Drain eu-1'", PATIENCE).await?;
    let nameless = page.nameless().await?;
    ensure!(nameless.is_empty(), "without a name: {nameless:?}");
    Ok(())
}

const VIEWS: [View; 4] = [
    View { width: 1280, height: 1400, dark: false },
    View { width: 1280, height: 1400, dark: true },
    View { width: 390, height: 844, dark: true },
    View { width: 390, height: 844, dark: false },
];

/// Screenshots for people to look at, and what can be checked without them: width, contrast, that there is something.
async fn look_at(name: &str, page: &Page, views: &[View]) -> Result<()> {
    let directory = target_directory().join("screenshots");
    fs::create_dir_all(&directory)?;
    for view in views {
        let scheme = if view.dark { "dark" } else { "light" };
        page.evaluate::<bool>("(scrollTo(0, 0), true)").await?;
        let png = page.screenshot(*view).await?;
        fs::write(directory.join(format!("{name}-{}-{scheme}.png", view.width)), &png)?;
        ensure!(Picture::of(&png)?.colours > 50, "{name}, {view:?} is empty");
        let (overflow, _) = eventually("the page is drawn in its new width", PATIENCE, async || {
            let overflow: i64 = page.evaluate("document.documentElement.scrollWidth - innerWidth").await?;
            if overflow <= 0 { Ok(overflow) } else { Err(anyhow!("{overflow} px too wide")) }
        })
        .await?;
        ensure!(overflow <= 0, "{name}, {view:?}");
        let faint = page.faint(CONTRAST).await?;
        ensure!(faint.is_empty(), "{name}, {view:?}: hard to read: {faint:?}");
        if view.width < 600 {
            // The rest of the phone's page, as one scrolls.
            for part in ["#mesh", "#regions", "#actions-title", "#explain", "#allocations-title"] {
                page.evaluate::<bool>(&format!("(document.querySelector({part:?}).scrollIntoView(), true)")).await?;
                let png = page.screenshot(*view).await?;
                fs::write(
                    directory.join(format!("{name}-{}-{scheme}{}.png", view.width, part.replace('#', "-"))),
                    &png,
                )?;
            }
        }
    }
    page.screenshot(VIEWS[0]).await.map(drop)
}
