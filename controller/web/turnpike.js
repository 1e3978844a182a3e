// @ts-check
/**
 * Turnpike's module for pages: TURN servers that stay good for as long as a call lasts, and calls that leave a relay
 * before it goes away. It depends on nothing.
 *
 *     import { Turnpike } from "https://turn.example.org/turnpike.js";
 *     const turnpike = new Turnpike({ user: "alice" });
 *     const pc = new RTCPeerConnection({ iceServers: await turnpike.iceServers() });
 *     turnpike.follow(pc);
 *
 * What it does to a connection that is followed:
 * - its servers are replaced before their credentials expire;
 * - when its relay drains it gets other servers and one ICE restart, at a random moment of the drain's time;
 * - when its relay is lost, nothing has come through for 3 s and nobody took the relay's place, the same at once;
 * - when it has failed, the same.
 * A relay that only restarts, or is only out of the controller's sight, goes on with all its calls: then nothing is
 * done. Connections that use no relay of the cluster are left alone, and so is everything while no controller answers.
 *
 * An ICE restart is a negotiation: the page has to answer `negotiationneeded` at any time, on both sides. "Perfect
 * negotiation" (W3C webrtc-pc, section 10.7) is the way.
 */

/**
 * A relay as the controller tells of it.
 * @typedef {object} Relay
 * @property {string} node who serves
 * @property {string} region
 * @property {string} relay_address its identity: another node may take it over
 * @property {string[]} relay_ips where relayed addresses are
 * @property {string[]} listeners `udp://192.0.2.1:3478`
 * @property {string} public_host name in `turns:` URIs, or empty
 * @property {"ready"|"draining"|"suspect"|"lost"} condition
 * @property {boolean} draining also while it is suspect
 * @property {?number} drain_deadline Unix ms
 * @property {?number} drain_ms what was left until then when this was said
 * @property {number} since Unix ms
 */

/**
 * What the page is told, where it gave a `notify`.
 * - `servers`: others than before; `expiresAt` in Unix ms
 * - `relay`: something happened to a relay (`ready`, `draining`, `suspect`, `lost`, `restored`, `moved`)
 * - `path`: a connection uses other relays than before
 * - `restart`: a connection was told to restart ICE, and why
 * - `stream`: the controller's events come, or do not
 * - `problem`: discovery failed; said once until it works again
 * @typedef {{ type: "servers", iceServers: RTCIceServer[], expiresAt: number }
 *   | { type: "relay", kind: string, relay: Relay }
 *   | { type: "path", connection: RTCPeerConnection, relays: Relay[] }
 *   | { type: "restart", connection: RTCPeerConnection, reason: "draining"|"lost"|"failed", relay: ?Relay }
 *   | { type: "stream", up: boolean }
 *   | { type: "problem", error: Error }} Notice
 */

/**
 * @typedef {object} Options
 * @property {string} [url] base URL of the controllers; without one, where this module came from
 * @property {string} [key] API key of the cluster. Who reads the page's source has it too: prefer `load`
 * @property {string} [user] name that credentials are made out to
 * @property {string} [region] wanted region
 * @property {string} [transports] wanted ways to the relay, such as `udp,tcp`
 * @property {number} [ttl] wanted life of the credentials, in seconds
 * @property {string} [session] name of the call: both its ends get one relay, or the cheapest pair
 * @property {boolean} [netcheck] false: do not measure round trips to the regions, once an hour, in the background
 * @property {() => Promise<{ iceServers: RTCIceServer[], ttl: number }>} [load] where servers come from instead of
 *   `/v1/ice-servers`, e.g. the page's own server, which asks there; `ttl` in seconds
 * @property {boolean} [events] false: do not listen to what happens to relays
 * @property {boolean} [restartFailed] false: leave connections that have failed to the page
 * @property {number} [spreadMs] longest time over which the connections of a draining relay are moved
 * @property {(notice: Notice) => void} [notify]
 */

/** A relay that was lost is left once nothing has come through it for this long. */
const SILENCE_MS = 3000;
/** Pause between two looks at connections that something is wrong with, and at others. */
const LOOK_MS = 500;
const SWEEP_MS = 20_000;
/** Time for an ICE restart, whoever began it, before there is another. */
const SETTLE_MS = 5000;
/** Without a word for this long the stream is dead: the controller sends a comment each 15 s. */
const DEAF_MS = 45_000;
/** What was measured is not measured again for this long. */
const NETCHECK_MS = 3_600_000;
/** From the opening of the page to the measurement: what the page loads comes first, the call after it. */
const NETCHECK_AFTER_MS = 300;
/** Pauses between attempts: first and longest. Each is shortened at random by up to half. */
const RETRY_MS = [1000, 30_000];
/** Longer than the state of a thousand relays. */
const MAX_EVENT = 4_000_000;
const DAY_MS = 86_400_000;

/** @param {number} attempt from 0 */
const pause = (attempt) => Math.min(RETRY_MS[0] * 2 ** attempt, RETRY_MS[1]) * (0.5 + Math.random() / 2);

/** Host of `turn:host:port?transport=udp` or `udp://host:port`, without brackets. @param {string | undefined} uri */
const hostOf = (uri) => /^[a-z]+:(?:\/\/)?(?:\[([^\]]+)\]|([^:?]+))/.exec(uri ?? "")?.slice(1).find(Boolean) ?? "";

/** @param {Relay} relay */
const hostsOf = (relay) => new Set([...relay.listeners.map(hostOf), ...relay.relay_ips, relay.public_host].filter(Boolean));

/**
 * Milliseconds from a STUN request of this browser to its answer, a little of its own work included; null if none comes, or
 * nothing shows when it came.
 * @param {string} stun `stun:192.0.2.1:3478` @param {number} [timeoutMs] @returns {Promise<?number>}
 */
export const roundTrip = (stun, timeoutMs = 3000) =>
  new Promise((done) => {
    const pc = new RTCPeerConnection({ iceServers: [{ urls: stun }] });
    let began = 0;
    const end = (/** @type {?number} */ ms) => {
      clearTimeout(timer);
      pc.close();
      done(ms);
    };
    const timer = setTimeout(() => end(null), timeoutMs);
    pc.addEventListener("icecandidate", ({ candidate }) => {
      if (candidate?.type === "srflx") end(performance.now() - began);
    });
    // Without a NAT, in a page that sees addresses, the answer brings no candidate of its own. Gathering ends after it, but
    // not before a tenth of a second is over: that is no round trip.
    pc.addEventListener("icegatheringstatechange", () => {
      if (pc.iceGatheringState === "complete") end(null);
    });
    pc.createDataChannel("netcheck");
    pc.createOffer()
      .then((offer) => {
        began = performance.now();
        return pc.setLocalDescription(offer);
      })
      .catch(() => end(null));
  });

/** @param {RTCIceServer[]} servers @returns {string[]} */
const urlsOf = (servers) => servers.flatMap(({ urls }) => urls);

/** Servers, and connections that follow what happens to them. */
export class Turnpike {
  #options;
  #headers;
  #closing = new AbortController();
  /** @type {Map<RTCPeerConnection, Connection>} */
  #connections = new Map();
  /** By relay address. @type {Map<string, Relay>} */
  #relays = new Map();
  /** @type {?{ iceServers: RTCIceServer[], at: number, dueAt: number, expiresAt: number }} */
  #servers = null;
  /** @type {?Promise<RTCIceServer[]>} */
  #loading = null;
  #failures = 0;
  /** Region of the newest servers. */
  #home = "";
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #netcheckTimer;
  #looking = false;
  #lookAgain = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #lookTimer;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #refreshTimer;

  /** @param {Options} [options] */
  constructor(options = {}) {
    this.#options = { restartFailed: true, events: true, netcheck: true, spreadMs: 60_000, ...options, url: (options.url ?? new URL(import.meta.url).origin).replace(/\/$/, "") };
    this.#headers = /** @type {Record<string, string>} */ (options.key ? { "X-API-Key": options.key } : {});
    if (this.#options.events) this.#listen();
    this.#planNetcheck();
    // A page that slept has missed its timers.
    for (const name of ["online", "pageshow", "visibilitychange"]) {
      globalThis.addEventListener?.(name, () => this.#awake(), { signal: this.#closing.signal, capture: true });
    }
  }

  /**
   * Servers for a new RTCPeerConnection, with credentials that are good for a while.
   * @returns {Promise<RTCIceServer[]>}
   */
  async iceServers() {
    if (this.#servers && Date.now() < this.#servers.dueAt) return this.#servers.iceServers;
    try {
      return await this.#load();
    } catch (error) {
      if (this.#servers && Date.now() < this.#servers.expiresAt) return this.#servers.iceServers;
      throw error;
    }
  }

  /** Keeps `connection` going from now on, until it is closed. @param {RTCPeerConnection} connection */
  follow(connection) {
    if (this.#connections.has(connection) || this.#closing.signal.aborted) return;
    const wake = () => this.#look();
    this.#connections.set(connection, new Connection(connection, wake));
    wake();
  }

  /** Leaves `connection` alone from now on. @param {RTCPeerConnection} connection */
  forget(connection) {
    this.#connections.get(connection)?.end();
    this.#connections.delete(connection);
  }

  /** The relays of the cluster that `connection` uses, as last looked at. @param {RTCPeerConnection} connection @returns {Relay[]} */
  relaysOf(connection) {
    const uses = this.#connections.get(connection)?.uses ?? new Map();
    return [...uses.keys()].map((address) => this.#relays.get(address)).filter((relay) => relay !== undefined);
  }

  /** Every relay that is known. @returns {Relay[]} */
  get relays() {
    return [...this.#relays.values()];
  }

  /** Ends everything that goes on here; connections stay as they are. */
  close() {
    this.#closing.abort();
    clearTimeout(this.#refreshTimer);
    clearTimeout(this.#lookTimer);
    clearTimeout(this.#netcheckTimer);
    for (const connection of this.#connections.keys()) this.forget(connection);
  }

  /**
   * Measures the round trip to a relay of each region that the controller takes to be worth it, and reports it: from then
   * on it counts for clients of this network. Two measurements each, of which the shorter counts.
   * @param {{ report?: boolean }} [options]
   * @returns {Promise<{ client: string, regions: { region: string, node: string, stun: string, rttMs: ?number }[] }>}
   */
  async netcheck({ report = true } = {}) {
    const { client, targets } = await this.#fetch("/v1/netcheck");
    const regions = await Promise.all(
      targets.map(async (/** @type {{ region: string, node: string, stun: string }} */ target) => {
        const first = await roundTrip(target.stun);
        const second = first === null ? null : await roundTrip(target.stun);
        return { ...target, rttMs: first === null ? null : Math.min(first, second ?? first) };
      }),
    );
    const measured = regions.filter(({ rttMs }) => rttMs !== null).map(({ region, rttMs }) => [region, rttMs]);
    if (report && measured.length > 0) {
      const body = JSON.stringify({ rtt_ms: Object.fromEntries(measured) });
      await this.#fetch("/v1/netcheck", { method: "POST", body, headers: { ...this.#headers, "Content-Type": "application/json" } });
    }
    return { client, regions };
  }

  /** Soon, so that the first servers are by what was measured, but once an hour at most. */
  #planNetcheck() {
    if (!this.#options.netcheck || this.#options.load || typeof RTCPeerConnection === "undefined") return;
    const mark = "turnpike.netcheck";
    this.#netcheckTimer = setTimeout(() => {
      try {
        if (Date.now() - Number(localStorage.getItem(mark) ?? 0) < NETCHECK_MS) return;
        localStorage.setItem(mark, String(Date.now()));
      } catch {
        // Without storage every page measures once.
      }
      this.netcheck().catch(() => {});
    }, NETCHECK_AFTER_MS);
  }

  /** @param {string} path @param {RequestInit} [init] */
  async #fetch(path, init = {}) {
    let answer;
    try {
      answer = await fetch(`${this.#options.url}${path}`, { cache: "no-store", headers: this.#headers, signal: AbortSignal.timeout(10_000), ...init });
    } catch (cause) {
      throw new Error("discovery does not answer", { cause });
    }
    const body = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(`discovery: ${body.error ?? `HTTP ${answer.status}`}`);
    return body;
  }

  /** @param {Notice} notice */
  #notify(notice) {
    try {
      this.#options.notify?.(notice);
    } catch (error) {
      // The page's own mistake must not stop what keeps its calls alive.
      globalThis.reportError?.(error);
    }
  }

  // ---- Servers

  /** Asks anew; whoever asks meanwhile gets the same answer. @returns {Promise<RTCIceServer[]>} */
  #load() {
    this.#loading ??= this.#ask().finally(() => (this.#loading = null));
    return this.#loading;
  }

  async #ask() {
    try {
      const { iceServers, ttl } = await (this.#options.load ?? (() => this.#discover()))();
      if (!Array.isArray(iceServers) || !(ttl > 0)) throw new Error("discovery answered without iceServers and ttl");
      const at = Date.now();
      // Not all pages at the same moment.
      const dueAt = at + ttl * 1000 * (0.6 + Math.random() * 0.2);
      this.#servers = { iceServers, at, dueAt, expiresAt: at + ttl * 1000 };
      this.#failures = 0;
      for (const connection of this.#connections.values()) connection.configure(iceServers);
      this.#notify({ type: "servers", iceServers, expiresAt: this.#servers.expiresAt });
      this.#plan(dueAt - at);
      return iceServers;
    } catch (error) {
      const problem = error instanceof Error ? error : new Error(String(error));
      if (this.#failures === 0 && !this.#closing.signal.aborted) this.#notify({ type: "problem", error: problem });
      this.#plan(pause(this.#failures));
      this.#failures += 1;
      throw problem;
    }
  }

  async #discover() {
    const { user, region, transports, ttl, session } = this.#options;
    const wanted = new URLSearchParams();
    // Whoever is in a call stays in its region unless another gains enough.
    const home = this.#connections.size > 0 ? this.#home : "";
    for (const [name, value] of Object.entries({ user, region, transport: transports, ttl, session, home })) if (value) wanted.set(name, String(value));
    const body = await this.#fetch(`/v1/ice-servers?${wanted}`);
    this.#home = body.region ?? "";
    return body;
  }

  /** @param {number} ms */
  #plan(ms) {
    clearTimeout(this.#refreshTimer);
    if (this.#closing.signal.aborted) return;
    // Timers take at most 24 days; whoever is woken early goes back to sleep.
    this.#refreshTimer = setTimeout(() => this.#refresh(), Math.min(ms, DAY_MS));
  }

  #refresh() {
    const left = this.#servers && this.#failures === 0 ? this.#servers.dueAt - Date.now() : 0;
    // Said by #ask already.
    if (left <= 0) this.#load().catch(() => {});
    else this.#plan(left);
  }

  #awake() {
    if (this.#servers && Date.now() >= this.#servers.dueAt && this.#failures === 0) this.#refresh();
    this.#look();
  }

  // ---- Events

  async #listen() {
    const { signal } = this.#closing;
    let [attempt, wasUp] = [0, false];
    while (!signal.aborted) {
      const began = Date.now();
      try {
        await this.#hear(() => {
          if (!wasUp) this.#notify({ type: "stream", up: true });
          wasUp = true;
        });
      } catch {
        // Why it ended makes no difference: it is asked for again.
      }
      if (signal.aborted) return;
      if (wasUp) this.#notify({ type: "stream", up: false });
      wasUp = false;
      attempt = Date.now() - began > RETRY_MS[1] ? 0 : attempt + 1;
      await new Promise((done) => setTimeout(done, pause(attempt)));
    }
  }

  /** One stream to its end. @param {() => void} opened */
  async #hear(opened) {
    const stream = new AbortController();
    const end = () => stream.abort();
    this.#closing.signal.addEventListener("abort", end, { signal: stream.signal });
    let deaf = setTimeout(end, DEAF_MS);
    try {
      const answer = await fetch(`${this.#options.url}/v1/events`, { cache: "no-store", headers: this.#headers, signal: stream.signal });
      if (!answer.ok || !answer.body) throw new Error(`events: HTTP ${answer.status}`);
      const reader = answer.body.getReader();
      const decoder = new TextDecoder();
      for (let text = ""; ; ) {
        const { done, value } = await reader.read();
        if (done) return;
        clearTimeout(deaf);
        deaf = setTimeout(end, DEAF_MS);
        text += decoder.decode(value, { stream: true });
        if (text.length > MAX_EVENT) throw new Error("an event without an end");
        const events = text.split("\n\n");
        text = events.pop() ?? "";
        for (const event of events) this.#take(event);
        opened();
      }
    } finally {
      clearTimeout(deaf);
      end();
    }
  }

  /** One event as it is on the wire. @param {string} event */
  #take(event) {
    const field = (/** @type {string} */ name) => event.split("\n").filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2)).join("\n");
    const name = field("event");
    if (name === "relays") {
      const { relays, complete } = JSON.parse(field("data"));
      const before = this.#relays;
      this.#relays = new Map(relays.map((/** @type {Relay} */ relay) => [relay.relay_address, relay]));
      for (const [address, relay] of before) {
        if (this.#relays.has(address)) continue;
        // Who has just started may not have seen it yet.
        this.#relays.set(address, complete ? { ...relay, condition: "lost" } : relay);
      }
      this.#prune();
    } else if (name === "relay") {
      const { kind, relay } = JSON.parse(field("data"));
      this.#relays.set(relay.relay_address, relay);
      this.#notify({ type: "relay", kind, relay });
    } else {
      return;
    }
    this.#look();
  }

  /** Lost relays that no connection uses are of no interest. */
  #prune() {
    const used = new Set([...this.#connections.values()].flatMap(({ uses }) => [...uses.keys()]));
    for (const [address, { condition }] of this.#relays) if (condition === "lost" && !used.has(address)) this.#relays.delete(address);
  }

  // ---- Connections

  /** Looks at every connection now, and again while there is something about one of them. */
  async #look() {
    this.#lookAgain = true;
    if (this.#looking || this.#closing.signal.aborted) return;
    this.#looking = true;
    clearTimeout(this.#lookTimer);
    let uneasy = false;
    try {
      // What happens while one connection is looked at may be of interest to another.
      while (this.#lookAgain) {
        this.#lookAgain = uneasy = false;
        for (const connection of [...this.#connections.values()]) {
          if (connection.isClosed) this.forget(connection.pc);
          else if (await this.#tend(connection)) uneasy = true;
        }
      }
    } finally {
      this.#looking = false;
      if (this.#connections.size > 0 && !this.#closing.signal.aborted) this.#lookTimer = setTimeout(() => this.#look(), uneasy ? LOOK_MS : SWEEP_MS);
    }
  }

  /** Does what has to be done now. @param {Connection} connection @returns {Promise<boolean>} whether to look again soon */
  async #tend(connection) {
    if (await connection.locate(this.#relays, this.#servers?.iceServers ?? [])) {
      this.#notify({ type: "path", connection: connection.pc, relays: this.relaysOf(connection.pc) });
    }
    const concern = connection.concern(this.#relays, this.#options);
    if (!concern) return false;
    const now = Date.now();
    const { reason, relay, since, dueAt } = concern;
    // Servers first, for all at once: the other side may be the one that restarts, and is answered with these.
    if (reason !== "watching" && !(this.#servers && this.#servers.at >= since)) {
      if (now >= since + connection.haste * Math.min(1000, dueAt - since)) this.#freshen();
      return true;
    }
    if (reason === "watching" || now < dueAt || !connection.isSettled || connection.isClosed) return true;
    if (reason !== "failed" && relay && !this.#leadsElsewhere(relay)) {
      if (now - (this.#servers?.at ?? 0) > RETRY_MS[1] / 3) this.#freshen();
      return true;
    }
    connection.restart(reason, relay);
    this.#notify({ type: "restart", connection: connection.pc, reason, relay });
    return true;
  }

  /** New servers, unless discovery has just failed: then the pause after it is kept. */
  #freshen() {
    if (this.#failures === 0) this.#load().catch(() => {});
  }

  /** Whether the servers are more than the relay that is to be left. @param {Relay} relay */
  #leadsElsewhere(relay) {
    const hosts = hostsOf(relay);
    return urlsOf(this.#servers?.iceServers ?? []).some((url) => url.startsWith("turn") && !hosts.has(hostOf(url)));
  }
}

/** Whom a connection's silence, restart or failure has to do with. */
class Connection {
  /** Relay addresses in use: what came through so far, and since when nothing has. @type {Map<string, { heard: number, quietSince: number }>} */
  uses = new Map();
  /** Whether it has ever been relayed by servers of ours. */
  isRelayed = false;
  /** 0..1: where in the time for something this connection has its turn. */
  haste = Math.random();
  /** Relay addresses that were left, or asked to be. @type {Set<string>} */
  #left = new Set();
  /** When a relay's drain was first seen. @type {Map<string, number>} */
  #drains = new Map();
  #failedAt = 0;
  #restartedAt = 0;
  #restarts = 0;
  #ufrag = "";
  #ending = new AbortController();

  /** @param {RTCPeerConnection} pc @param {() => void} wake */
  constructor(pc, wake) {
    this.pc = pc;
    const { signal } = this.#ending;
    pc.addEventListener("connectionstatechange", () => this.#changed(wake), { signal });
    pc.addEventListener("signalingstatechange", () => this.#negotiated(), { signal });
    this.#negotiated();
  }

  end() {
    this.#ending.abort();
  }

  get isClosed() {
    return this.pc.signalingState === "closed" || this.pc.connectionState === "closed";
  }

  /** Nobody is in the middle of a negotiation or of an ICE restart. */
  get isSettled() {
    const patience = Math.min(SETTLE_MS * 2 ** Math.max(0, this.#restarts - 1), RETRY_MS[1]);
    return this.pc.signalingState === "stable" && Date.now() - this.#restartedAt >= patience;
  }

  /** @param {() => void} wake */
  #changed(wake) {
    const state = this.pc.connectionState;
    this.#failedAt = state === "failed" ? this.#failedAt || Date.now() : 0;
    if (state === "connected") this.#restarts = 0;
    wake();
  }

  /** Another ufrag is an ICE restart, whoever asked for it (RFC 8445 §9). */
  #negotiated() {
    if (this.pc.signalingState !== "stable") return;
    const ufrag = /^a=ice-ufrag:(.*)$/m.exec(this.pc.localDescription?.sdp ?? "")?.[1] ?? "";
    if (this.#ufrag && ufrag !== this.#ufrag) this.#restartedAt = Date.now();
    this.#ufrag = ufrag;
  }

  /** @param {RTCIceServer[]} iceServers */
  configure(iceServers) {
    if (this.isClosed) return;
    try {
      this.pc.setConfiguration({ ...this.pc.getConfiguration(), iceServers });
    } catch (error) {
      // A connection whose configuration cannot be changed keeps what it has.
      console.debug("turnpike: setConfiguration", error);
    }
  }

  /**
   * Finds out which relays are in use. While there is no pair, those of the last one count.
   * @param {Map<string, Relay>} relays @param {RTCIceServer[]} servers @returns {Promise<boolean>} whether they are others
   */
  async locate(relays, servers) {
    /** @type {Map<string, any>} */
    const report = await this.pc.getStats().catch(() => new Map());
    const entries = [...report.values()];
    const chosen = entries.filter(({ type }) => type === "transport").map(({ selectedCandidatePairId }) => report.get(selectedCandidatePairId));
    // Firefox marks the pair itself.
    const pairs = [...chosen, ...entries.filter(({ type, selected }) => type === "candidate-pair" && selected)].filter(Boolean);
    if (pairs.length === 0) return false;
    const uses = new Map();
    const ours = new Set(urlsOf(servers).map(hostOf));
    this.isRelayed = false;
    for (const pair of pairs) {
      const local = report.get(pair.localCandidateId);
      if (local?.candidateType !== "relay") continue;
      const address = local.address ?? local.ip;
      const host = hostOf(local.url);
      const relay = [...relays.values()].find((relay) => relay.relay_ips.includes(address)) ?? [...relays.values()].find((relay) => host && hostsOf(relay).has(host));
      this.isRelayed ||= relay !== undefined || ours.has(host);
      if (!relay) continue;
      // Answers to connectivity checks count: a call may have nothing to say.
      const heard = (pair.bytesReceived ?? 0) + (pair.packetsReceived ?? 0) + (pair.responsesReceived ?? 0) + (pair.requestsReceived ?? 0);
      const before = this.uses.get(relay.relay_address);
      uses.set(relay.relay_address, { heard, quietSince: before?.heard === heard ? before.quietSince : Date.now() });
    }
    const others = [...uses.keys()].some((address) => !this.uses.has(address)) || uses.size !== this.uses.size;
    this.uses = uses;
    return others;
  }

  /**
   * What is to be done, since when that is so, and when it is due; `watching` is to look again soon.
   * @param {Map<string, Relay>} relays @param {Options} options
   * @returns {?{ reason: "failed"|"lost"|"draining"|"watching", relay: ?Relay, since: number, dueAt: number }}
   */
  concern(relays, { restartFailed, spreadMs = 0 }) {
    const now = Date.now();
    const used = [...this.uses.keys()].map((address) => relays.get(address)).filter((relay) => relay !== undefined);
    for (const address of this.#drains.keys()) {
      // Uncordoned, or left: the next drain is another one.
      if (!used.some((relay) => relay.relay_address === address && relay.draining)) this.#drains.delete(address);
    }
    for (const address of this.#left) if (relays.get(address)?.draining === false) this.#left.delete(address);
    if (this.#failedAt && restartFailed && this.isRelayed) {
      return { reason: "failed", relay: used[0] ?? null, since: this.#failedAt, dueAt: this.#failedAt + this.haste * 500 };
    }
    const lost = used.find(({ condition }) => condition === "lost");
    if (lost) {
      const { quietSince } = this.uses.get(lost.relay_address) ?? { quietSince: now };
      if (now - quietSince < SILENCE_MS) return { reason: "watching", relay: lost, since: now, dueAt: Infinity };
      const since = quietSince + SILENCE_MS;
      return { reason: "lost", relay: lost, since, dueAt: since + this.haste * 500 };
    }
    const draining = used.find((relay) => relay.draining && !this.#left.has(relay.relay_address));
    if (draining) {
      const since = this.#drains.get(draining.relay_address) ?? now;
      this.#drains.set(draining.relay_address, since);
      // The second half of a known time is kept for those who could not leave at once.
      const window = Math.min(spreadMs, (draining.drain_ms ?? Infinity) / 2);
      // Both sides shall have their new servers before the first of them restarts.
      const head = Math.min(1500, window / 4);
      return { reason: "draining", relay: draining, since, dueAt: since + head + this.haste * (window - head) };
    }
    // So that the silence is known from its beginning, should the relay be lost.
    return used.some(({ condition }) => condition === "suspect") ? { reason: "watching", relay: null, since: now, dueAt: Infinity } : null;
  }

  /** New candidates by the servers that are set. @param {string} reason @param {?Relay} relay */
  restart(reason, relay) {
    if (reason === "draining" && relay) this.#left.add(relay.relay_address);
    this.#restartedAt = Date.now();
    this.#restarts += 1;
    this.haste = Math.random();
    this.pc.restartIce();
  }
}
