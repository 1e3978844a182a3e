// From a snapshot to the page. Elements are kept by key and changed in place, so focus and scrolling survive.
import { askToDrain, askToEnd, uncordon } from "./acting.js";
import { ask } from "./api.js";
import { offerRegions } from "./explain.js";
import { bitrate, clock, count, duration, person, plural } from "./format.js";
import { keyed, part, text } from "./keyed.js";
import { drawMap } from "./map.js";
import { mayNot, onSession, session } from "./session.js";
import { History, spark } from "./spark.js";

/** Seconds of history behind each sparkline. */
const HISTORY = 120;
/** Rows drawn at most; the rest is counted in the note. */
const MAX_ROWS = 200;

const byId = (id) => document.getElementById(id);
/** Below this many bytes a second (100 kbit/s) a sparkline stays low: noise is not drawn as a mountain. */
const LITTLE_TRAFFIC = 12_500;
const totals = { allocations: new History(HISTORY, 4), traffic: new History(HISTORY, LITTLE_TRAFFIC), packets: new History(HISTORY, 50) };
const traffic = new Map();
let shown = null;

const STATES = {
  ready: "good",
  standby: "good",
  draining: "warn",
  overloaded: "warn",
  suspect: "warn",
  lost: "bad",
};

/** Says that the controller is away since `lastSnapshotAt` (Unix ms, 0 for never), or back (`null`); `why` instead of the usual. */
export const away = (lastSnapshotAt, why) => {
  const live = byId("live");
  const banner = byId("away");
  banner.hidden = lastSnapshotAt === null;
  if (lastSnapshotAt === null) {
    text(live, "live");
    live.dataset.tone = "good";
    return;
  }
  text(live, why ? "signed out" : "reconnecting");
  live.dataset.tone = "warn";
  if (why) {
    text(banner, why);
    return;
  }
  const age = lastSnapshotAt ? `What you see is ${duration((Date.now() - lastSnapshotAt) / 1000)} old.` : "";
  text(banner, `The controller does not answer; trying again. Calls go on without it. ${age}`);
};

/** Draws a snapshot. */
export const render = (snapshot) => {
  const fresh = shown?.at !== snapshot.at;
  shown = snapshot;
  const nodes = snapshot.nodes ?? [];
  const controller = snapshot.controller ?? {};
  text(byId("controller"), [controller.id, controller.version && `version ${controller.version}`, controller.store && `${controller.store} store`].filter(Boolean).join(" · "));
  byId("store").hidden = controller.store_healthy !== false;
  text(byId("store-problem"), controller.store_problem || "the store is not healthy");
  if (fresh) remember(nodes, snapshot.allocations ?? []);
  drawTotals(nodes, snapshot.regions ?? []);
  drawRegions(nodes, snapshot.regions ?? []);
  // Shown before it is measured: what is hidden has no width.
  byId("mesh").hidden = false;
  byId("mesh").hidden = !drawMap(nodes, snapshot.regions ?? []);
  offerRegions([...new Set(nodes.map((node) => node.region))].sort());
  drawEvents(snapshot.events ?? []);
  drawActions(snapshot.actions ?? []);
  drawAllocations();
};

const sum = (nodes, field) => nodes.reduce((total, node) => total + (node[field] ?? 0), 0);

const remember = (nodes) => {
  totals.allocations.push(sum(nodes, "allocations"));
  totals.traffic.push(sum(nodes, "bytes_per_second"));
  totals.packets.push(sum(nodes, "packets_per_second"));
  const present = new Set(nodes.map((node) => node.id));
  for (const id of traffic.keys()) if (!present.has(id)) traffic.delete(id);
  for (const node of nodes) {
    if (!traffic.has(node.id)) traffic.set(node.id, new History(HISTORY, LITTLE_TRAFFIC));
    traffic.get(node.id).push(node.bytes_per_second ?? 0);
  }
};

/** Those that clients may be sent to; a standby is none until its address is its own. */
const serving = (nodes) => nodes.filter((node) => node.state !== "standby");

const drawTotals = (nodes, regions) => {
  const ready = nodes.filter((node) => node.state === "ready").length;
  text(byId("total-relays"), nodes.length ? `${ready} of ${serving(nodes).length}` : "0");
  text(byId("total-regions"), regions.length ? `in ${plural(regions.length, "region")}` : "no region yet");
  text(byId("total-allocations"), count(sum(nodes, "allocations")));
  text(byId("total-traffic"), bitrate(sum(nodes, "bytes_per_second")));
  text(byId("total-packets"), count(sum(nodes, "packets_per_second")));
  spark(byId("spark-allocations"), totals.allocations);
  spark(byId("spark-traffic"), totals.traffic);
  spark(byId("spark-packets"), totals.packets);
};

const drawRegions = (nodes, regions) => {
  const names = [...new Set([...regions.map((region) => region.name), ...nodes.map((node) => node.region)])].sort();
  byId("no-relays").hidden = nodes.length > 0;
  keyed(byId("regions"), names, (name) => name, newRegion, (element, name) => {
    const own = nodes.filter((node) => node.region === name);
    const ready = own.filter((node) => node.state === "ready").length;
    element.style.setProperty("--relays", Math.max(1, own.length));
    text(part(element, "name"), name);
    text(part(element, "summary"), `${ready} of ${serving(own).length} ready · ${plural(sum(own, "allocations"), "allocation")} · ${bitrate(sum(own, "bytes_per_second"))}`);
    keyed(part(element, "relays"), own, (node) => node.id, newRelay, drawRelay);
  });
};

const make = (html) => {
  const template = document.createElement("template");
  template.innerHTML = html;
  return template.content.firstElementChild;
};

const newRegion = () =>
  make(`<section class="region"><header><h3 data-part="name"></h3><span class="quiet small" data-part="summary"></span></header><div class="relays" data-part="relays"></div></section>`);

const newRelay = () =>
  make(`<article class="card relay">
    <header><h4 data-part="id"></h4><span class="pill" data-part="state"></span></header>
    <p class="where mono" data-part="where"></p>
    <p class="reason" data-part="reason" hidden></p>
    <p class="reason" data-part="journal" hidden>Cannot write its journal: its records are in the store alone.</p>
    <dl>
      <div><dt>Allocations</dt><dd data-part="allocations"></dd></div>
      <div><dt>Packets/s</dt><dd data-part="packets"></dd></div>
      <div><dt>Traffic</dt><dd data-part="traffic"></dd></div>
    </dl>
    <svg class="spark" data-part="spark" aria-hidden="true"></svg>
    <div class="load"><span>CPU</span><div class="track" data-part="track" role="meter" aria-label="CPU of the busiest worker" aria-valuemin="0" aria-valuemax="100"><i data-part="fill"></i></div><span data-part="cpu"></span></div>
    <div class="load" data-part="drain" hidden><span data-part="drain-what"></span><div class="track" data-part="drain-track" role="meter" aria-label="Time of the drain that has passed" aria-valuemin="0" aria-valuemax="100"><i data-part="drain-fill"></i></div><span data-part="drain-left"></span></div>
    <footer data-part="footer"></footer>
    <p class="act"><button type="button" class="plain" data-part="act" aria-describedby="may-not"></button></p>
  </article>`);

const drawRelay = (element, node) => {
  const state = part(element, "state");
  text(part(element, "id"), node.id);
  text(state, node.state ?? "unknown");
  state.dataset.tone = STATES[node.state] ?? "";
  const reason = part(element, "reason");
  text(reason, node.reason ?? "");
  reason.hidden = !node.reason;
  text(part(element, "where"), (node.listeners ?? []).map(listener).join("  "));
  text(part(element, "allocations"), count(node.allocations));
  text(part(element, "packets"), count(node.packets_per_second));
  text(part(element, "traffic"), bitrate(node.bytes_per_second));
  spark(part(element, "spark"), traffic.get(node.id));
  const percent = Math.min(100, (node.cpu_permille ?? 0) / 10);
  const track = part(element, "track");
  track.setAttribute("aria-valuenow", percent.toFixed(0));
  track.dataset.tone = percent >= 85 ? "bad" : percent >= 60 ? "warn" : "";
  part(element, "fill").style.width = `${percent}%`;
  text(part(element, "cpu"), `${percent.toFixed(0)} %`);
  part(element, "journal").hidden = !node.journal_failed;
  drawDrain(element, node);
  drawAct(element, node);
  const place = node.zone ? `zone ${node.zone} · ` : "";
  text(part(element, "footer"), `${place}epoch ${node.epoch ?? "–"} · version ${node.version ?? "–"} · heard ${ago(node.last_report_ms_ago)}`);
};

/** The button that drains the relay or takes that back; off, and why, for those who may only look. */
const drawAct = (element, node) => {
  const button = part(element, "act");
  const cordoned = node.drain !== null && node.drain !== undefined;
  text(button, cordoned ? "Uncordon" : "Drain…");
  button.setAttribute("aria-label", cordoned ? `Uncordon ${node.id}` : `Drain ${node.id}`);
  button.title = mayNot();
  button.disabled = !session.may_act;
  button.onclick = () => (cordoned ? uncordon(node) : askToDrain(node));
};

/** How far a drain has come: what is left, by transport, and how much of its time has passed. */
const drawDrain = (element, node) => {
  const row = part(element, "drain");
  row.hidden = node.state !== "draining";
  if (row.hidden) return;
  const by = Object.entries(node.by_transport ?? {}).filter(([, held]) => held > 0);
  const left = by.map(([transport, held]) => `${transport.toUpperCase()} ${count(held)}`).join(" · ");
  text(part(element, "drain-what"), node.allocations ? `Left: ${left || count(node.allocations)}` : "Empty");
  const { since_ms_ago: passed = 0, deadline_in_ms: ahead = null } = node.drain ?? {};
  const percent = ahead === null ? 0 : ahead <= 0 ? 100 : (100 * passed) / (passed + ahead);
  const track = part(element, "drain-track");
  track.hidden = ahead === null;
  track.setAttribute("aria-valuenow", percent.toFixed(0));
  track.dataset.tone = percent >= 100 && node.allocations ? "bad" : "warn";
  part(element, "drain-fill").style.width = `${percent}%`;
  text(part(element, "drain-left"), ahead === null ? "no deadline" : ahead <= 0 ? "time is up" : `${duration(ahead / 1000)} to go`);
};

/** A listener is `udp://192.0.2.1:3478`, or an object of the same. */
const listener = (entry) => (typeof entry === "string" ? entry : `${entry.transport}://${entry.address}`);

const ago = (ms) => (ms === undefined || ms === null ? "never" : ms < 1500 ? "just now" : `${duration(ms / 1000)} ago`);

/** What an operator should notice; allocations come and go all day. */
const TONES = [
  [/lost|expired|superseded|failed|revoked/, "bad"],
  [/suspect|drain|overload|node_left/, "warn"],
  [/join|ready|restored|back/, "good"],
];

const drawEvents = (events) => {
  const newest = [...events].sort((a, b) => b.at - a.at).slice(0, 50);
  byId("no-events").hidden = newest.length > 0;
  byId("events").hidden = newest.length === 0;
  const seen = new Map();
  const key = (event) => {
    const base = `${event.at} ${event.kind} ${event.node} ${event.detail}`;
    const n = seen.get(base) ?? 0;
    seen.set(base, n + 1);
    return `${base} ${n}`;
  };
  const rows = newest.map((event) => [key(event), event]);
  keyed(byId("events"), rows, ([k]) => k, () => make(`<li><time data-part="at"></time><span><strong data-part="kind"></strong> <span data-part="node"></span></span><span class="detail" data-part="detail"></span></li>`), (element, [, event]) => {
    element.dataset.tone = TONES.find(([pattern]) => pattern.test(event.kind))?.[1] ?? "";
    const at = part(element, "at");
    at.dateTime = new Date(event.at).toISOString();
    text(at, clock(event.at));
    text(part(element, "kind"), String(event.kind).replaceAll("_", " "));
    text(part(element, "node"), event.node ?? "");
    const detail = part(element, "detail");
    text(detail, event.detail ? person(event.detail) : "");
    detail.hidden = !event.detail;
  });
};

/** `revoke_allocation` as people say it: what one did, and what one could not do. */
const VERBS = {
  drain: ["drained", "drain"],
  uncordon: ["uncordoned", "uncordon"],
  revoke_allocation: ["ended allocation", "end allocation"],
  rotate_keys: ["rotated", "rotate"],
  retire_key: ["retired key", "retire key"],
  revoke_relay: ["revoked relay", "revoke relay"],
  reinstate_relay: ["reinstated relay", "reinstate relay"],
};
const OUTCOMES = { done: "", denied: "bad", failed: "warn", unknown: "warn" };

/** The audit log: what was done, by whom, and what was only tried. */
const drawActions = (actions) => {
  byId("no-actions").hidden = actions.length > 0;
  byId("actions").hidden = actions.length === 0;
  const seen = new Map();
  const rows = actions.map((action) => {
    const base = `${action.at} ${action.controller} ${action.action} ${action.on}`;
    seen.set(base, (seen.get(base) ?? 0) + 1);
    return [`${base} ${seen.get(base)}`, action];
  });
  keyed(byId("actions"), rows, ([k]) => k, () => make(`<li><time data-part="at"></time><span><strong data-part="caller"></strong> <span data-part="what"></span></span><span class="detail" data-part="detail"></span></li>`), (element, [, action]) => {
    element.dataset.tone = OUTCOMES[action.outcome] ?? "";
    const at = part(element, "at");
    at.dateTime = new Date(action.at).toISOString();
    at.title = new Date(action.at).toLocaleString("en-GB");
    text(at, clock(action.at));
    text(part(element, "caller"), action.caller);
    const [did, verb] = VERBS[action.action] ?? [action.action, action.action];
    const how = { done: did, denied: `may not ${verb}`, failed: `could not ${verb}`, unknown: `did not wait for the end of: ${verb}` }[action.outcome] ?? verb;
    text(part(element, "what"), `${how} ${action.on}`);
    text(part(element, "detail"), [action.detail, `by ${action.via} at ${action.controller}`].filter(Boolean).join(" · "));
  });
};

const CELLS = ["User", "Relay", "Client", "Relayed address", "Permissions", "Channels", "Age", "Expires in", "Act"];
/** A search is asked for once nobody has typed for this long, and again each this long while it is shown. */
const TYPING_MS = 250;
const AGAIN_MS = 2000;

/** What a search has found: `{ wanted, allocations, more, problem }`; `null` while nothing is searched. */
let found = null;

const drawAllocations = () => {
  if (!shown) return;
  const nodes = shown.nodes ?? [];
  const newest = shown.allocations ?? [];
  const all = found ? found.allocations : newest;
  const sorted = [...all].sort((a, b) => (a.age_s ?? 0) - (b.age_s ?? 0) || (a.id < b.id ? -1 : 1));
  const rows = sorted.slice(0, MAX_ROWS);
  const known = Math.max(sum(nodes, "allocations"), newest.length);
  let note = "";
  if (found) note = found.problem ?? `${count(all.length)} found${found.more ? ", there may be more: say more of it" : ""}`;
  else if (known > rows.length) note = `${count(rows.length)} of ${count(known)} shown, the newest`;
  text(byId("allocations-note"), note);
  const empty = byId("no-allocations");
  empty.hidden = rows.length > 0;
  byId("allocations").closest("table").hidden = rows.length === 0;
  text(empty, found ? "No allocation has this in its user, relay, client, address or id." : "No allocation is open. Start a call, or run turnctl probe, and it shows up here within a second.");
  keyed(byId("allocations"), rows, (row) => `${row.node} ${row.id}`, newRow, drawRow);
};

const newRow = () => {
  const row = document.createElement("tr");
  for (const name of CELLS) {
    const cell = row.insertCell();
    cell.dataset.name = name;
    if (["Permissions", "Channels", "Age", "Expires in"].includes(name)) cell.className = "number";
    if (["Client", "Relayed address"].includes(name)) cell.className = "mono";
    if (name === "Act") {
      cell.dataset.only = "actors";
      cell.append(make(`<button type="button" class="plain slight">End…</button>`));
    }
  }
  return row;
};

const drawRow = (row, allocation) => {
  const [user, relay, client, relayed, permissions, channels, age, expires, act] = row.cells;
  text(user, person(allocation.user));
  user.title = allocation.user ?? "";
  text(relay, allocation.node);
  text(client, `${allocation.client} ${allocation.transport ?? ""}`.trim());
  text(relayed, allocation.relayed);
  text(permissions, count(allocation.permissions));
  text(channels, count(allocation.channels));
  text(age, duration(allocation.age_s));
  text(expires, duration(allocation.expires_s));
  const end = act.firstElementChild;
  end.setAttribute("aria-label", `End the allocation of ${person(allocation.user)} on ${allocation.node}`);
  end.onclick = () => askToEnd(allocation);
};

/** Asks the controller for allocations that contain what was typed, and keeps asking while it stands there. */
export const startSearching = () => {
  const field = byId("filter");
  let timer = 0;
  let running = new AbortController();
  const search = async () => {
    running.abort();
    running = new AbortController();
    const { signal } = running;
    const wanted = field.value.trim();
    if (!wanted) {
      found = null;
      drawAllocations();
      return;
    }
    try {
      const { allocations, more } = await ask("/v1/console/allocations", { search: wanted }, { signal });
      if (signal.aborted) return;
      found = { wanted, allocations, more };
    } catch (error) {
      if (signal.aborted) return;
      found = { wanted, allocations: found?.allocations ?? [], more: false, problem: error.message };
    }
    drawAllocations();
    timer = setTimeout(search, AGAIN_MS);
  };
  field.addEventListener("input", () => {
    clearTimeout(timer);
    running.abort();
    timer = setTimeout(search, TYPING_MS);
  });
};

onSession(() => shown && render(shown));
