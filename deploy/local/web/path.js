// Which relays a call runs through, and how to say it. Relays are what `/turnpike.js` knows of them.

/** `host` and `port` of `turn:host:port?transport=udp` or `udp://host:port`; the port may be missing. */
const hostPort = (uri) => /^[a-z]+:(?:\/\/)?(\[[^\]]+\]|[^:?]+)(?::(\d+))?/.exec(uri ?? "")?.slice(1, 3) ?? [];

/** The relay that serves at this URI. */
const relayAt = (relays, uri) => {
  const [host, port = "3478"] = hostPort(uri);
  return relays.find((relay) => relay.listeners.some((listener) => hostPort(listener)[0] === host && (hostPort(listener)[1] ?? "3478") === port));
};

/** The relay that owns this relayed address. */
const relayOwning = (relays, address) => relays.find((relay) => relay.relay_ips.includes(address));

const at = (end) => (end.address ? `${end.address}${end.port ? `:${end.port}` : ""}` : "");

/** What is worth a word beside a relay. */
const CONDITIONS = {
  draining: "drains: the call moves to another relay",
  suspect: "out of the controller's sight",
  lost: "gone",
};

const TYPES = { relay: "relayed", srflx: "behind a NAT", prflx: "behind a NAT", host: "direct" };

/** The stations from this browser to the other one: `[{ kind, title, detail, note }]`. */
export const stations = (pair, relays) => {
  const { local, remote } = pair;
  const list = [{ kind: "person", title: "You", detail: local.type === "relay" ? `to the relay by ${(local.relayProtocol ?? local.protocol).toUpperCase()}` : `${TYPES[local.type]}, ${at(local)}` }];
  const near = local.type === "relay" && (relayOwning(relays, local.address) ?? relayAt(relays, local.url));
  const far = remote.type === "relay" && relayOwning(relays, remote.address);
  const station = (relay, detail) => list.push({ kind: "relay", title: relay ? `${relay.node} · region ${relay.region}` : "A relay", detail, note: CONDITIONS[relay?.condition] ?? "" });
  if (near && near === far) {
    station(near, `relayed addresses ${at(local)} and ${at(remote)}`);
  } else {
    if (local.type === "relay") station(near, `relayed address ${at(local)}`);
    if (remote.type === "relay") station(far, `relayed address ${at(remote)}`);
  }
  list.push({ kind: "person", title: "The other person", detail: remote.type === "relay" ? "behind their relay" : `${TYPES[remote.type] ?? remote.type} ${at(remote)}` });
  return list;
};

/** The chosen pair in one line. */
export const pairLine = ({ local, remote }) => {
  const end = ({ type, protocol, relayProtocol }) => (type === "relay" ? `relay${relayProtocol ? ` over ${relayProtocol}` : ""}` : `${type} ${protocol}`);
  return `Chosen pair: ${end(local)} ↔ ${end(remote)}${local.url ? ` · ${local.url}` : ""}`;
};

/** Ids of the nodes in the pair, this side's first. */
export const nodesOf = ({ local, remote }, relays) =>
  [local.type === "relay" && (relayOwning(relays, local.address) ?? relayAt(relays, local.url)), remote.type === "relay" && relayOwning(relays, remote.address)].filter(Boolean).map((relay) => relay.node);
