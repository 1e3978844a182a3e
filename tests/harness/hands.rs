//! Hands on a page: a mouse and a keyboard whose events come from the browser, not from a script; and what those who use neither
//! eyes nor mouse would find.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::chromium::Page;

/// Most stops of Tab on the way to something.
const STOPS: usize = 200;

/// Text whose colour is too close to what is behind it.
#[derive(Clone, Debug, Deserialize)]
pub struct Faint {
    /// The text, shortened.
    pub text: String,
    /// Contrast, 1 to 21.
    pub ratio: f64,
}

impl Page {
    /// Clicks with the left button in the middle of the first element that matches, which is scrolled to.
    ///
    /// # Errors
    /// It is not there, hidden, or covered by something else.
    pub async fn click(&self, selector: &str) -> Result<()> {
        let script = format!(
            "(() => {{ const e = document.querySelector({selector:?}); if (!e) return null; \
             e.scrollIntoView({{ block: 'center', behavior: 'instant' }}); const r = e.getBoundingClientRect(); \
             const [x, y] = [r.x + r.width / 2, r.y + r.height / 2]; const at = document.elementFromPoint(x, y); \
             return {{ x, y, hit: !!at && (e.contains(at) || at.contains(e) && at.tagName === 'LABEL') }}; }})()"
        );
        let spot: Value = self.evaluate(&script).await?;
        ensure!(spot["hit"] == true, "{selector} cannot be clicked: {spot}");
        for (kind, buttons) in [("mouseMoved", 0), ("mousePressed", 1), ("mouseReleased", 0)] {
            let event = json!({"type": kind, "x": spot["x"], "y": spot["y"], "button": if kind == "mouseMoved" { "none" } else { "left" },
                               "buttons": buttons, "clickCount": i32::from(kind != "mouseMoved")});
            self.call("Input.dispatchMouseEvent", event).await?;
        }
        Ok(())
    }

    /// Types into whatever has the focus.
    ///
    /// # Errors
    /// The page is gone.
    pub async fn write(&self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({"text": text})).await.map(drop)
    }

    /// Presses and releases a key: `Tab`, `Enter`, `Escape`, `Space`, `ArrowDown`.
    ///
    /// # Errors
    /// No such key is known here, or the page is gone.
    pub async fn press(&self, key: &str) -> Result<()> {
        let (code, text) = match key {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            "Escape" => (27, ""),
            "Space" => (32, " "),
            "ArrowDown" => (40, ""),
            _ => anyhow::bail!("no key {key}"),
        };
        let name = if key == "Space" { " " } else { key };
        let mut down = json!({"type": if text.is_empty() { "rawKeyDown" } else { "keyDown" }, "key": name, "code": key,
                              "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code});
        if !text.is_empty() {
            down["text"] = json!(text);
        }
        self.call("Input.dispatchKeyEvent", down).await?;
        let up = json!({"type": "keyUp", "key": name, "code": key, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code});
        self.call("Input.dispatchKeyEvent", up).await.map(drop)
    }

    /// Goes on by Tab until what matches has the focus. Whatever has it on the way must be seen to have it.
    ///
    /// # Errors
    /// Tab does not lead there, or a stop shows no focus.
    pub async fn tab_to(&self, selector: &str) -> Result<()> {
        for _ in 0..STOPS {
            self.press("Tab").await?;
            let script = format!(
                "(() => {{ const e = document.activeElement; if (!e || e === document.body) return {{ there: false, seen: true }}; \
                 const s = getComputedStyle(e); return {{ there: e.matches({selector:?}), name: e.outerHTML.slice(0, 120), \
                 seen: s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2 }}; }})()"
            );
            let stop: Value = self.evaluate(&script).await?;
            ensure!(stop["seen"] == true, "no focus is to be seen on {stop}");
            if stop["there"] == true {
                return Ok(());
            }
        }
        anyhow::bail!("Tab does not lead to {selector}")
    }

    /// Makes the page the one that has the keyboard, whatever other windows do.
    ///
    /// # Errors
    /// The page is gone.
    pub async fn focus(&self) -> Result<()> {
        self.call("Emulation.setFocusEmulationEnabled", json!({"enabled": true})).await.map(drop)
    }

    /// What can be operated and has no name that a screen reader could say, as roles with their node ids.
    ///
    /// # Errors
    /// The browser refuses.
    pub async fn nameless(&self) -> Result<Vec<String>> {
        self.call("Accessibility.enable", json!({})).await?;
        let tree = self.call("Accessibility.getFullAXTree", json!({})).await?;
        let operated = ["button", "textbox", "searchbox", "combobox", "checkbox", "link", "img", "table", "dialog"];
        let nodes = tree["nodes"].as_array().context("nodes")?;
        let nameless = nodes.iter().filter(|node| {
            let role = node["role"]["value"].as_str().unwrap_or_default();
            node["ignored"] != true
                && operated.contains(&role)
                && node["name"]["value"].as_str().unwrap_or_default().trim().is_empty()
        });
        Ok(nameless.map(|node| format!("{} {}", node["role"]["value"], node["backendDOMNodeId"])).collect())
    }

    /// Texts that are shown with less contrast than this; those of what is off are left out.
    ///
    /// # Errors
    /// The page is gone.
    pub async fn faint(&self, least: f64) -> Result<Vec<Faint>> {
        self.evaluate(&format!("({FAINT})({least})")).await
    }
}

/// WCAG 2.2's contrast of every text that is shown, of letters in SVG too.
const FAINT: &str = r"(least) => {
  const parts = (colour) => (colour.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => top[i] * a + below[i] * (1 - a)); };
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if ((colour[3] ?? 1) > 0) layers.push(colour);
      if ((colour[3] ?? 1) === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    const text = walk.currentNode.textContent.trim();
    if (!text || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (element.closest('title, script, style, option, :disabled, .visually-hidden')) continue;
    const style = getComputedStyle(element);
    const below = behind(element);
    const colour = over(parts(element.closest('svg') ? style.fill : style.color), below);
    const [a, b] = [light(colour), light(below)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least) found.push({ text: text.slice(0, 40), ratio });
  }
  return found;
}";
