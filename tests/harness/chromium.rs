//! Headless Chromium on a host of the test, driven by the DevTools protocol over two pipes.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::process::{Host, Process, append_to};
use crate::wait::eventually;

/// Longest a browser may take for one command. A loaded two-core machine starts a page in a few seconds.
const ANSWER: Duration = Duration::from_secs(30);

/// No background traffic (the machine has no internet), a camera that needs no consent, no throttling of hidden pages.
const FLAGS: &[&str] = &[
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-breakpad",
    "--metrics-recording-only",
    "--mute-audio",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    "--remote-debugging-pipe",
];

/// Name of the function that a page calls to tell the test something.
pub const TELL: &str = "tellTest";

/// A browser. Ends with this value.
pub struct Browser {
    // Declared first: the process goes before the threads that read from it.
    _process: Process,
    connection: Arc<Connection>,
}

/// A page in a browser of its own window.
pub struct Page {
    connection: Arc<Connection>,
    session: String,
    told: mpsc::UnboundedReceiver<String>,
}

/// What a browser finds on its machine.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Home directory, with the database of trusted authorities; none for that of whoever runs the test.
    pub home: Option<PathBuf>,
    /// Addresses of host names.
    pub hosts: Vec<(String, IpAddr)>,
}

/// Size and colours a page is looked at with.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// CSS pixels.
    pub width: u32,
    /// CSS pixels.
    pub height: u32,
    /// `prefers-color-scheme: dark`.
    pub dark: bool,
}

impl Browser {
    /// Starts Chromium with a new profile in `directory`; what it writes is in `<name>.chromium` there.
    ///
    /// # Errors
    /// It is not installed or does not answer.
    pub async fn launch(host: &Host, directory: &Path, name: &str) -> Result<Self> {
        Self::launch_with(host, directory, name, &Surroundings::default()).await
    }

    /// The same, in these surroundings.
    ///
    /// # Errors
    /// It is not installed or does not answer.
    pub async fn launch_with(host: &Host, directory: &Path, name: &str, around: &Surroundings) -> Result<Self> {
        // Not among the logs that a failed test shows: Chromium complains at length of what this machine does not have.
        let log = directory.join(format!("{name}.chromium"));
        let profile = directory.join(format!("{name}.profile"));
        let mut command = Command::new("sh");
        // The protocol's pipes are descriptors 3 (in) and 4 (out).
        command.arg("-c").arg("exec chromium \"$@\" 3<&0 4>&1 </dev/null >&2").arg("chromium").args(FLAGS);
        if let Some(home) = &around.home {
            command.env("HOME", home);
        }
        if !around.hosts.is_empty() {
            let rules: Vec<String> = around.hosts.iter().map(|(name, at)| format!("MAP {name} {at}")).collect();
            command.arg(format!("--host-resolver-rules={}", rules.join(",")));
        }
        command.arg(format!("--user-data-dir={}", profile.display())).arg("about:blank");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(append_to(&log)?);
        let mut child = host.spawn(command)?;
        let input = child.stdin.take().context("no pipe to Chromium")?;
        let output = child.stdout.take().context("no pipe from Chromium")?;
        let process = Process::adopt(name, child, log);
        let connection = Connection::new(input, output);
        let browser = Self { _process: process, connection };
        browser.connection.call(None, "Browser.getVersion", json!({})).await.context("Chromium does not answer")?;
        Ok(browser)
    }

    /// Opens a page and waits until it is loaded.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub async fn open(&self, url: &str) -> Result<Page> {
        let target =
            self.connection.call(None, "Target.createTarget", json!({"url": "about:blank", "newWindow": true})).await?;
        let attached = self
            .connection
            .call(None, "Target.attachToTarget", json!({"targetId": target["targetId"], "flatten": true}))
            .await?;
        let session = attached["sessionId"].as_str().context("no session")?.to_owned();
        let told = self.connection.subscribe(&session);
        let page = Page { connection: Arc::clone(&self.connection), session, told };
        for domain in ["Page.enable", "Runtime.enable"] {
            page.call(domain, json!({})).await?;
        }
        page.call("Runtime.addBinding", json!({"name": TELL})).await?;
        page.navigate(url).await?;
        Ok(page)
    }
}

impl Page {
    /// Loads another address in this page.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub async fn navigate(&self, url: &str) -> Result<()> {
        let answer = self.call("Page.navigate", json!({"url": url})).await?;
        if let Some(error) = answer["errorText"].as_str() {
            bail!("{url}: {error}");
        }
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'", ANSWER).await
    }

    /// Value of an expression, or of the promise it evaluates to.
    ///
    /// # Errors
    /// It throws, or has another type.
    pub async fn evaluate<T: DeserializeOwned>(&self, expression: &str) -> Result<T> {
        let params = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let answer = self.call("Runtime.evaluate", params).await?;
        if let Some(exception) = answer.get("exceptionDetails") {
            let text =
                exception["exception"]["description"].as_str().or(exception["text"].as_str()).unwrap_or("it threw");
            let shown: String = expression.chars().take(80).collect();
            bail!("{shown}: {text}");
        }
        serde_json::from_value(answer["result"]["value"].clone()).with_context(|| format!("value of {expression}"))
    }

    /// Waits until a condition holds in the page.
    ///
    /// # Errors
    /// It does not within `limit`.
    pub async fn wait_for(&self, condition: &str, limit: Duration) -> Result<()> {
        eventually(condition, limit, async || match self.evaluate::<bool>(&format!("!!({condition})")).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(anyhow!("false")),
            Err(error) => Err(error),
        })
        .await?;
        Ok(())
    }

    /// Next message that the page passed to the function named [`TELL`]; none once the browser is gone.
    pub async fn told(&mut self) -> Option<String> {
        self.told.recv().await
    }

    /// Whether a message waits.
    #[must_use]
    pub fn has_told(&self) -> bool {
        !self.told.is_empty()
    }

    /// PNG of the page as seen with `view`; the page keeps that size and those colours.
    ///
    /// # Errors
    /// The browser refuses.
    pub async fn screenshot(&self, view: View) -> Result<Vec<u8>> {
        let size =
            json!({"width": view.width, "height": view.height, "deviceScaleFactor": 1, "mobile": view.width < 600});
        self.call("Emulation.setDeviceMetricsOverride", size).await?;
        let scheme = if view.dark { "dark" } else { "light" };
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", media).await?;
        let condition =
            format!("innerWidth === {} && matchMedia('(prefers-color-scheme: {scheme})').matches", view.width);
        self.wait_for(&condition, ANSWER).await?;
        // Two frames: laid out, then painted.
        self.evaluate::<bool>("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r(true))))")
            .await?;
        let shot = self.call("Page.captureScreenshot", json!({"format": "png"})).await?;
        Ok(STANDARD.decode(shot["data"].as_str().context("no picture")?)?)
    }

    pub(crate) async fn call(&self, method: &str, params: Value) -> Result<Value> {
        self.connection.call(Some(&self.session), method, params).await
    }
}

type Waiting = HashMap<u64, oneshot::Sender<Value>>;
type Listeners = HashMap<String, mpsc::UnboundedSender<String>>;

/// Commands out, answers and events in; messages end with a zero byte.
struct Connection {
    next_id: AtomicU64,
    input: Mutex<ChildStdin>,
    waiting: Arc<Mutex<Waiting>>,
    listeners: Arc<Mutex<Listeners>>,
}

impl Connection {
    fn new(input: ChildStdin, output: ChildStdout) -> Arc<Self> {
        let connection = Arc::new(Self {
            next_id: AtomicU64::new(1),
            input: Mutex::new(input),
            waiting: Arc::default(),
            listeners: Arc::default(),
        });
        let (waiting, listeners) = (Arc::clone(&connection.waiting), Arc::clone(&connection.listeners));
        // Ends when Chromium closes its end, at the latest when it is killed.
        std::thread::spawn(move || read(output, &waiting, &listeners));
        connection
    }

    fn subscribe(&self, session: &str) -> mpsc::UnboundedReceiver<String> {
        let (sender, receiver) = mpsc::unbounded_channel();
        lock(&self.listeners).insert(session.to_owned(), sender);
        receiver
    }

    async fn call(&self, session: Option<&str>, method: &str, params: Value) -> Result<Value> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({"id": id, "method": method, "params": params});
        if let Some(session) = session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        lock(&self.input).write_all(&bytes).with_context(|| format!("{method}: Chromium has ended"))?;
        let answer = tokio::time::timeout(ANSWER, receiver)
            .await
            .with_context(|| format!("{method}: no answer within {ANSWER:?}"))?
            .with_context(|| format!("{method}: Chromium has ended"))?;
        if let Some(error) = answer.get("error") {
            bail!("{method}: {error}");
        }
        Ok(answer["result"].clone())
    }
}

fn read(output: ChildStdout, waiting: &Mutex<Waiting>, listeners: &Mutex<Listeners>) {
    for message in BufReader::new(output).split(0).map_while(Result::ok) {
        let Ok(message) = serde_json::from_slice::<Value>(&message) else {
            continue;
        };
        if let Some(id) = message["id"].as_u64() {
            if let Some(sender) = lock(waiting).remove(&id) {
                // A caller that gave up is no longer there.
                let _ = sender.send(message);
            }
        } else if message["method"] == "Runtime.bindingCalled"
            && let (Some(session), Some(payload)) =
                (message["sessionId"].as_str(), message["params"]["payload"].as_str())
            && let Some(sender) = lock(listeners).get(session)
        {
            let _ = sender.send(payload.to_owned());
        }
    }
    // Whoever still waits is told by the closing of its channel.
    lock(waiting).clear();
    lock(listeners).clear();
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
