// "Test my connection": what the network between this browser and the relays does to calls. A browser cannot send from an
// address of its choice, so how a NAT filters stays unknown; `turnctl nat` tells.

/** Longest wait for an answer. A blocked port is silent, and browsers ask for longer than anybody waits. */
const PATIENCE_MS = 4000;

/** Candidates of one kind, by these servers alone: `[{ address, port, url }]`. Ends with `isEnough`, or in time. */
const gather = (configuration, kind, isEnough) =>
  new Promise((done) => {
    const pc = new RTCPeerConnection(configuration);
    const found = [];
    const end = () => {
      clearTimeout(timer);
      pc.close();
      done(found);
    };
    const timer = setTimeout(end, PATIENCE_MS);
    pc.addEventListener("icecandidate", ({ candidate }) => {
      if (candidate?.type !== kind) return;
      found.push({ address: candidate.address, port: candidate.port, url: candidate.url ?? "" });
      if (isEnough(found)) end();
    });
    pc.addEventListener("icegatheringstatechange", () => {
      if (pc.iceGatheringState === "complete") end();
    });
    pc.createDataChannel("test");
    pc.createOffer().then((offer) => pc.setLocalDescription(offer)).catch(end);
  });

/** `udp`, `tcp`, `tls` and port of a TURN URI. */
export const wayOf = (url) => {
  const [, scheme, port, transport] = /^(turns?):(?:\[[^\]]+\]|[^:?]+)(?::(\d+))?(?:\?transport=(\w+))?/.exec(url) ?? [];
  if (!scheme) return null;
  const secure = scheme === "turns";
  return { way: secure ? "tls" : (transport ?? "udp"), port: Number(port ?? (secure ? 5349 : 3478)) };
};

/**
 * Tries everything at once. `stun` are STUN URIs of different servers, `turn` is an entry of `iceServers`.
 * @returns `{ seen: [{ address, port, url }], ways: [{ way, port, url, works }], servers }`
 */
export const examine = async ({ stun, turn }) => {
  const relayed = async (url) => {
    const server = { urls: url, username: turn.username, credential: turn.credential };
    const found = await gather({ iceServers: [server], iceTransportPolicy: "relay" }, "relay", () => true);
    return { ...wayOf(url), url, works: found.length > 0 };
  };
  const urls = turn.urls.filter((url) => wayOf(url));
  // More than three servers tell nothing more of a NAT.
  const asked = stun.slice(0, 3);
  const seen = gather({ iceServers: [{ urls: asked }] }, "srflx", () => false);
  const [first, ...ways] = await Promise.all([seen, ...urls.map(relayed)]);
  return { seen: first, ways, servers: asked.length };
};

/** What was found, in words: `{ kind, mapping, headline, sentences }`. `servers` are how many STUN servers were asked. Pure. */
export const verdict = ({ seen, ways, servers }) => {
  const works = (test) => ways.some((it) => it.works && test(it));
  const tried = (test) => ways.some(test);
  const udp = seen.length > 0 || works(({ way }) => way === "udp");
  const stream = ({ way }) => way !== "udp";
  const on443 = (it) => stream(it) && it.port === 443;
  const elsewhere = (it) => stream(it) && it.port !== 443;
  const ports = new Map();
  for (const { address, port } of seen) ports.set(address, (ports.get(address) ?? new Set()).add(port));
  const symmetric = [...ports.values()].some((of) => of.size > 1);
  // RFC 4787 §4.1. One server is seen under one port behind every NAT.
  const mapping = symmetric ? "address-dependent" : seen.length > 0 && servers > 1 ? "endpoint-independent" : "unknown";
  if (!udp && !works(stream)) {
    return { kind: "nothing", mapping, headline: "No relay can be reached from here", sentences: ["Neither UDP nor TCP nor TLS gets through. Ask whoever runs this network to let UDP 3478 or TCP 443 out."] };
  }
  if (!udp) {
    const sentences = ["Every call goes by TCP or TLS through a relay: it works, with more delay when packets are lost."];
    const only443 = works(on443) && tried(elsewhere) && !works(elsewhere);
    if (only443) sentences.push("Only port 443 gets through; relays need a TLS or TCP listener there.");
    return { kind: only443 ? "only-443" : "udp-blocked", mapping, headline: "UDP is blocked", sentences };
  }
  if (symmetric) {
    return { kind: "symmetric", mapping, headline: "A NAT that gives every destination another port (symmetric)", sentences: ["Direct calls work only with open networks: most calls from here need a relay."] };
  }
  if (seen.length === 0) {
    return { kind: "open", mapping, headline: "UDP gets through, and no NAT shows", sentences: ["Direct calls work with most people."] };
  }
  if (mapping === "unknown") {
    return { kind: "nat", mapping, headline: "A NAT", sentences: ["Whether it gives every destination another port takes relays in two regions to tell."] };
  }
  return { kind: "cone", mapping, headline: "A NAT with one outside port for all destinations", sentences: ["Direct calls work unless the other side has a symmetric NAT or no UDP; then a relay carries them."] };
};
