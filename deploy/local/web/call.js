// The call page: the form, one call, and what is shown of it. Tests read `window.turnpike`.
//
// ?room=NAME  &relay=0|1  &region=NAME  &transport=udp|tcp|tls  &fake=1 (test picture)  &auto=1 (join at once)
// &discovery=URL (another controller)  &ttl=SECONDS (life of the credentials)
import { bitrate } from "/shared/format.js";
import { keyed, part, text } from "/shared/keyed.js";
import { Turnpike } from "/turnpike.js";
import { openMedia } from "./media.js";
import { examine, verdict } from "./network.js";
import { nodesOf, pairLine, stations } from "./path.js";
import { Peer } from "./peer.js";
import { plot } from "./plot.js";
import { Signal } from "./signal.js";
import { PauseWatch, Sampler } from "./stats.js";

const query = new URLSearchParams(location.search);
const discovery = (query.get("discovery") ?? "").replace(/\/$/, "");
const byId = (id) => document.getElementById(id);

/** Everything a test wants to know; also what this page keeps. */
const turnpike = {
  state: "idle",
  history: [],
  room: "",
  error: "",
  pc: null,
  connectMs: null,
  framesDecoded: 0,
  /** Longest time without a picture from the other side since the first, to about 100 ms; may be set to 0. */
  get longestPauseMs() {
    return pauses?.longestMs ?? 0;
  },
  set longestPauseMs(value) {
    if (pauses) pauses.longestMs = value;
  },
  samples: [],
  pair: null,
  /** Nodes in the pair. */
  relays: [],
  iceServers: null,
  /** What the module that keeps the call going has said, with the time. */
  notices: [],
  /** What "test my connection" found: `{ kind, headline, sentences, seen, ways, regions }`. */
  network: null,
  testConnection: () => testConnection(),
  join: () => join(),
  hangUp: () => hangUp(),
};
window.turnpike = turnpike;

let media = null;
let signal = null;
let peer = null;
let peerName = null;
let sampling = null;
let pauses = null;
/** Servers, and what keeps the call on a living relay. */
let keeper = null;

const STATES = {
  idle: ["ready", ""],
  media: ["opening the camera", ""],
  discovering: ["asking for a relay", ""],
  waiting: ["waiting", ""],
  connecting: ["connecting", "warn"],
  connected: ["connected", "good"],
  interrupted: ["no packets, waiting for the relay", "warn"],
  reconnecting: ["looking for another way", "warn"],
  failed: ["not connected", "bad"],
  ended: ["call ended", ""],
  full: ["room is full", "bad"],
  error: ["not connected", "bad"],
};

const setState = (state) => {
  if (turnpike.state === state) return;
  turnpike.state = state;
  turnpike.history.push({ state, at: Date.now() });
  const [words, tone] = STATES[state];
  const pill = byId("state");
  text(pill, words);
  pill.dataset.tone = tone;
  drawWaiting();
};

const say = (id, message) => {
  byId(id).hidden = !message;
  text(byId(id), message ?? "");
  if (id === "problem") turnpike.error = message ?? "";
};

// ---- Discovery

const ask = async (path) => {
  let answer;
  try {
    answer = await fetch(`${discovery}${path}`, { cache: "no-store" });
  } catch {
    throw new Error("Discovery does not answer: is the cluster running?");
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(`Discovery says: ${body.error ?? `HTTP ${answer.status}`}`);
  return body;
};

/** Begins to keep servers for this call. */
const discover = async () => {
  keeper = new Turnpike({
    url: discovery || location.origin,
    // The room's name is what the console shows beside the allocations of this call.
    user: turnpike.room,
    region: byId("region").value,
    transports: byId("transport").value,
    ttl: Number(query.get("ttl")) || undefined,
    spreadMs: 15_000,
    // The button measures, not the call.
    netcheck: false,
    notify: heard,
  });
  turnpike.iceServers = await keeper.iceServers();
};

/** What the keeper says. */
const heard = (notice) => {
  const { type, reason, relay, relays, kind, iceServers } = notice;
  turnpike.notices.push({ at: Date.now(), type, reason, kind, relay: relay?.node, relays: relays?.map(({ node }) => node) });
  if (turnpike.notices.length > 500) turnpike.notices.shift();
  if (type === "servers") turnpike.iceServers = iceServers;
  if (type === "restart") {
    peer?.restarts();
    say("relay-news", RESTARTS[reason](relay?.node ?? "The relay"));
  }
  if (type === "path" && relays.length && byId("relay-news").textContent) say("relay-news", `The call runs over ${relays.map(({ node }) => node).join(" and ")} now.`);
  if (type === "relay") drawLive();
};

const RESTARTS = {
  draining: (relay) => `${relay} is about to go; looking for another relay while the call goes on.`,
  lost: (relay) => `${relay} is gone; looking for another relay.`,
  failed: () => "The connection broke; looking for another way.",
};

const configuration = () => ({
  iceServers: turnpike.iceServers,
  iceTransportPolicy: byId("relay").checked ? "relay" : "all",
});

const listRegions = async () => {
  try {
    const { regions } = await ask("/v1/regions");
    const wanted = query.get("region");
    for (const { name } of regions) byId("region").append(new Option(name, name, false, name === wanted));
  } catch (error) {
    say("problem", error.message);
  }
};

// ---- The network

/** Tries what gets through, measures the regions, and says it in words. */
const testConnection = async () => {
  const button = byId("test");
  button.disabled = true;
  byId("network").hidden = false;
  text(byId("network-headline"), "Trying…");
  text(byId("network-advice"), "");
  fields("network-ways", []);
  fields("network-regions", []);
  const tester = new Turnpike({ url: discovery || location.origin, user: "connection-test", events: false, netcheck: false });
  try {
    const { targets } = await ask("/v1/netcheck");
    const [turn] = await tester.iceServers();
    // One after the other: what is measured should be alone.
    const found = await examine({ stun: targets.map(({ stun }) => stun), turn });
    const { regions } = await tester.netcheck();
    turnpike.network = { ...verdict(found), ...found, regions };
    drawNetwork(turnpike.network);
  } catch (error) {
    text(byId("network-headline"), "Not tested");
    text(byId("network-advice"), error.message);
  } finally {
    tester.close();
    button.disabled = false;
  }
};

/** How a NAT maps (RFC 4787), for people. */
const MAPPINGS = {
  "endpoint-independent": "the same outside port for every destination",
  "address-dependent": "another outside port for each destination",
};

const drawNetwork = ({ headline, sentences, mapping, seen, ways, regions }) => {
  text(byId("network-headline"), headline);
  text(byId("network-advice"), sentences.join(" "));
  // Relays are tried one by one; what reaches one of them gets through.
  const through = new Map();
  for (const { way, port, works } of ways) {
    const name = `${way.toUpperCase()} ${port}`;
    through.set(name, works || (through.get(name) ?? false));
  }
  const outside = [...new Set(seen.map(({ address, port }) => `${address}:${port}`))];
  fields("network-ways", [
    ...(outside.length ? [["Seen from outside as", outside.join(", ")]] : []),
    ...(MAPPINGS[mapping] ? [["Mapping", `${MAPPINGS[mapping]} (${mapping})`]] : []),
    ...[...through].map(([name, works]) => [name, works ? "gets through" : name.startsWith("TLS") ? "blocked, or not trusted" : "blocked"]),
  ]);
  const nearest = [...regions].sort((a, b) => (a.rttMs ?? Infinity) - (b.rttMs ?? Infinity));
  fields("network-regions", nearest.map(({ region, rttMs }) => [region, rttMs === null ? "not measured" : `${Math.round(rttMs)} ms`]));
};

/** Names and values of a list. */
const fields = (id, rows) => {
  const row = ([name, value]) => {
    const [line, term, detail] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
    text(term, name);
    text(detail, value);
    line.append(term, detail);
    return line;
  };
  byId(id).replaceChildren(...rows.map(row));
};

// ---- The call

const join = async () => {
  if (signal) return;
  say("problem", "");
  turnpike.room = byId("room").value;
  document.body.dataset.view = "call";
  byId("lobby").hidden = true;
  byId("live").hidden = false;
  byId("controls").hidden = false;
  drawLive();
  try {
    setState("media");
    media = await openMedia(byId("fake").checked);
    say("note", media.note);
    byId("local").srcObject = media.stream;
    document.body.dataset.mirror = media.isTest ? "no" : "yes";
    setState("discovering");
    await discover();
  } catch (error) {
    say("problem", error.message);
    leave("error");
    return;
  }
  query.set("room", turnpike.room);
  history.replaceState(null, "", `?${query}`);
  setState("waiting");
  signal = new Signal(turnpike.room, {
    on: hear,
    onLink: (up) => {
      if (!up && !peer) say("note", "The connection to the call page's server broke; trying again.");
      else say("note", media.note);
    },
  });
};

const hear = (message) => {
  switch (message.type) {
    case "welcome":
      if (message.peer) meet(message.peer, true);
      break;
    case "joined":
      meet(message.peer, false);
      break;
    case "left":
      // Only signalling broke: the call itself may well go on, and ends by its own state if not.
      if (message.orderly) partWith("They hung up.");
      break;
    case "signal":
      peer?.take(message.data).catch((error) => say("problem", `The browsers did not understand each other: ${error.message}`));
      break;
    case "full":
      leave("full");
      say("problem", `Two people are in room ${turnpike.room} already. Choose another room.`);
      break;
    case "replaced":
      leave("ended");
      say("problem", "This call was taken over by another connection of the same page.");
      break;
  }
};

/** Somebody is there. The same one coming back over a new signalling connection changes nothing. */
const meet = (name, polite) => {
  if (peer && peerName === name && peer.state !== "failed") return;
  dropPeer();
  say("problem", "");
  peerName = name;
  peer = new Peer({
    configuration: configuration(),
    stream: media.stream,
    polite,
    send: (data) => signal?.send(data),
    on: { state: peerState, track: showRemote, nothingGathered, gathered: () => say("problem", "") },
  });
  keeper.follow(peer.pc);
  turnpike.pc = peer.pc;
  turnpike.connectMs = null;
  turnpike.samples = [];
  setState("connecting");
  const sampler = new Sampler(peer.pc);
  pauses = new PauseWatch(peer.pc);
  sampling = setInterval(() => sample(sampler), 1000);
};

const peerState = (state) => {
  if (!peer || state === "closed") return;
  turnpike.connectMs = peer.connectMs ?? null;
  const { connectionState, iceConnectionState } = peer.pc;
  text(byId("ice"), connectionState === iceConnectionState ? connectionState : `${connectionState} / ${iceConnectionState}`);
  setState(state);
  if (state === "failed") say("problem", turnpike.error || failure());
  if (state === "connected") say("problem", "");
};

const failure = () =>
  byId("relay").checked
    ? "No way through: the browsers could not reach each other through the relays. The relay may be down or blocked by a firewall; try the other transport."
    : "No way through: neither a direct connection nor a relay worked.";

/** `isOver`: the browser has stopped asking. */
const nothingGathered = (errors, isOver) => {
  const asked = [...new Set(errors.map(({ url }) => url).filter(Boolean))];
  const servers = asked.length ? asked : (turnpike.iceServers ?? []).flatMap(({ urls }) => urls);
  const reason = errors.find(({ errorText }) => errorText)?.errorText;
  const answer = isOver ? "No relay answered, so there is nothing to connect through." : "No relay has answered yet; the browser keeps asking.";
  say("problem", `${answer} Asked: ${servers.join(", ")}.${reason ? ` The browser says: ${reason.replace(/\.+$/, "")}.` : ""}`);
  if (isOver) setState("failed");
};

const showRemote = (stream) => {
  const video = byId("remote");
  video.srcObject = stream;
  video.muted = false;
  video.play().catch(() => {
    // Without a click browsers play silent video only.
    video.muted = true;
    byId("sound").hidden = false;
    video.play().catch(() => {});
  });
};

/** The other one is gone; the room stays open. */
const partWith = (words) => {
  dropPeer();
  setState("waiting");
  text(byId("waiting-headline"), words);
};

const dropPeer = () => {
  clearInterval(sampling);
  pauses?.stop();
  peer?.close();
  peer = null;
  peerName = null;
  turnpike.pair = null;
  say("relay-news", "");
  byId("remote").srcObject = null;
  drawLive();
};

const hangUp = () => leave("ended");

const leave = (state) => {
  signal?.bye();
  signal = null;
  dropPeer();
  keeper?.close();
  keeper = null;
  media?.stream.getTracks().forEach((track) => track.stop());
  media = null;
  byId("local").srcObject = null;
  document.body.dataset.view = "lobby";
  byId("lobby").hidden = false;
  byId("live").hidden = true;
  byId("controls").hidden = true;
  byId("sound").hidden = true;
  say("note", "");
  setState(state);
};

// ---- What is shown

const sample = async (sampler) => {
  const taken = await sampler.take();
  if (sampler.pc !== turnpike.pc || !peer) return;
  turnpike.samples.push(taken);
  if (turnpike.samples.length > 600) turnpike.samples.shift();
  turnpike.framesDecoded = taken.framesDecoded;
  turnpike.pair = taken.pair ?? null;
  turnpike.relays = taken.pair ? nodesOf(taken.pair, keeper.relays) : [];
  drawLive();
};

const percent = (fraction) => `${(fraction * 100).toFixed(fraction > 0 && fraction < 0.1 ? 1 : 0)} %`;

const drawLive = () => {
  const last = turnpike.samples.at(-1);
  const pair = peer && turnpike.pair;
  const route = pair ? stations(pair, keeper.relays) : [];
  keyed(byId("route"), route, (station) => `${station.kind} ${route.indexOf(station)}`, newStation, drawStation);
  text(byId("pair"), pair ? pairLine(pair) : "Shown as soon as the call is connected.");
  text(byId("rtt"), last?.rttMs === undefined ? "–" : `${last.rttMs.toFixed(last.rttMs < 10 ? 1 : 0)} ms`);
  text(byId("loss"), last ? `${percent(last.lossIn)} / ${percent(last.lossOut)}` : "–");
  text(byId("picture"), last?.width ? `${last.width}×${last.height}, ${Math.round(last.framesPerSecond)} fps` : "–");
  text(byId("connect"), turnpike.connectMs === null ? "–" : `${turnpike.connectMs} ms`);
  text(byId("pause"), last?.framesDecoded ? `${(turnpike.longestPauseMs / 1000).toFixed(1)} s` : "–");
  text(byId("rate-in"), last ? bitrate(last.inPerSecond) : "–");
  text(byId("rate-out"), last ? bitrate(last.outPerSecond) : "–");
  plot(byId("plot"), turnpike.samples);
};

const newStation = ({ kind }) => {
  const item = document.createElement("li");
  item.dataset.kind = kind;
  for (const [tag, name] of [["strong", "title"], ["span", "detail"], ["span", "note"]]) {
    const element = document.createElement(tag);
    element.dataset.part = name;
    element.className = name;
    item.append(element);
  }
  return item;
};

const drawStation = (item, station) => {
  text(part(item, "title"), station.title);
  text(part(item, "detail"), station.detail);
  text(part(item, "note"), station.note ?? "");
};

const WAITING = {
  idle: ["Nobody here yet", "Choose a room and join; whoever opens the same room meets you there."],
  media: ["Opening camera and microphone", "Your browser may ask whether this page may use them."],
  discovering: ["Asking for the nearest relay", ""],
  waiting: ["Waiting for the other person", "Open this link in a second window, or on another device."],
  connecting: ["Connecting", "The other person is here; the browsers look for a way through the relays."],
  failed: ["Not connected", "Hang up and join again to try once more."],
  ended: ["The call has ended", "Join again whenever you like."],
  full: ["The room is full", ""],
  error: ["Not connected", ""],
};

const drawWaiting = () => {
  const words = WAITING[turnpike.state];
  byId("waiting").hidden = !words;
  if (!words) return;
  text(byId("waiting-headline"), words[0]);
  text(byId("waiting-detail"), words[1]);
  byId("invite").hidden = turnpike.state !== "waiting";
  byId("link").value = shareLink();
  byId("second").href = shareLink();
};

/** This call's address: the choices that matter to the other one too. */
const shareLink = () => {
  const link = new URL(location.pathname, location.href);
  link.searchParams.set("room", turnpike.room || byId("room").value);
  if (!byId("relay").checked) link.searchParams.set("relay", "0");
  for (const name of ["region", "transport"]) if (byId(name).value) link.searchParams.set(name, byId(name).value);
  if (discovery) link.searchParams.set("discovery", discovery);
  return link.href;
};

const inventRoom = () => {
  const words = [["amber", "brisk", "calm", "clear", "gentle", "lunar", "quiet", "silver", "sunny", "swift"], ["birch", "brook", "cedar", "falcon", "harbour", "heron", "maple", "otter", "pine", "robin"]];
  const random = crypto.getRandomValues(new Uint32Array(3));
  return `${words[0][random[0] % 10]}-${words[1][random[1] % 10]}-${(random[2] % 900) + 100}`;
};

const toggle = (button, kind, [on, off]) => {
  const tracks = media?.stream.getTracks().filter((track) => track.kind === kind) ?? [];
  const enabled = !tracks.some((track) => track.enabled);
  for (const track of tracks) track.enabled = enabled;
  button.setAttribute("aria-pressed", String(!enabled));
  text(button, enabled ? on : off);
};

const start = async () => {
  byId("room").value = query.get("room") || inventRoom();
  byId("relay").checked = query.get("relay") !== "0";
  byId("fake").checked = query.get("fake") === "1";
  byId("transport").value = query.get("transport") ?? "";
  drawWaiting();
  byId("lobby").addEventListener("submit", (event) => {
    event.preventDefault();
    join();
  });
  byId("test").addEventListener("click", testConnection);
  byId("hang-up").addEventListener("click", hangUp);
  byId("microphone").addEventListener("click", (event) => toggle(event.currentTarget, "audio", ["Mute", "Unmute"]));
  byId("camera").addEventListener("click", (event) => toggle(event.currentTarget, "video", ["Stop video", "Start video"]));
  byId("sound").addEventListener("click", (event) => {
    byId("remote").muted = false;
    event.currentTarget.hidden = true;
  });
  byId("copy").addEventListener("click", async () => {
    byId("link").select();
    const copied = await navigator.clipboard?.writeText(byId("link").value).then(() => true, () => false);
    text(byId("copy"), copied ? "Copied" : "Press Ctrl-C");
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawLive);
  addEventListener("resize", drawLive);
  addEventListener("pagehide", () => signal?.bye());
  await listRegions();
  if (query.get("auto") === "1") join();
};

start();
