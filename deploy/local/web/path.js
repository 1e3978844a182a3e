// Which relays a call runs through, and how to say it.

/** `host` and `port` of `turn:host:port?transport=udp` or `udp://host:port`; the port may be missing. */
const hostPort = (uri) => /^[a-z]+:(?:\/\/)?(\[[^\]]+\]|[^:?]+)(?::(\d+))?/.exec(uri ?? "")?.slice(1, 3) ?? [];

/** The relay that serves at this URI, among those of `/v1/nodes`. */
const nodeAt = (nodes, uri) => {
  const [host, port = "3478"] = hostPort(uri);
  return nodes.find((node) => (node.listeners ?? []).some((listener) => hostPort(listener)[0] === host && (hostPort(listener)[1] ?? "3478") === port));
};

/** The relay that owns this relayed address. */
const nodeOwning = (nodes, address) => nodes.find((node) => (node.listeners ?? []).some((listener) => hostPort(listener)[0] === address));

const at = (end) => (end.address ? `${end.address}${end.port ? `:${end.port}` : ""}` : "");

const TYPES = { relay: "relayed", srflx: "behind a NAT", prflx: "behind a NAT", host: "direct" };

/** The stations from this browser to the other one: `[{ kind, title, detail }]`. */
export const stations = (pair, nodes) => {
  const { local, remote } = pair;
  const list = [{ kind: "person", title: "You", detail: local.type === "relay" ? `to the relay by ${(local.relayProtocol ?? local.protocol).toUpperCase()}` : `${TYPES[local.type]}, ${at(local)}` }];
  const near = local.type === "relay" && (nodeAt(nodes, local.url) ?? nodeOwning(nodes, local.address));
  const far = remote.type === "relay" && nodeOwning(nodes, remote.address);
  const relay = (node, detail) => list.push({ kind: "relay", title: node ? `${node.id} · region ${node.region}` : "A relay", detail });
  if (near && near === far) {
    relay(near, `relayed addresses ${at(local)} and ${at(remote)}`);
  } else {
    if (local.type === "relay") relay(near, `relayed address ${at(local)}`);
    if (remote.type === "relay") relay(far, `relayed address ${at(remote)}`);
  }
  list.push({ kind: "person", title: "The other person", detail: remote.type === "relay" ? "behind their relay" : `${TYPES[remote.type] ?? remote.type} ${at(remote)}` });
  return list;
};

/** The chosen pair in one line. */
export const pairLine = ({ local, remote }) => {
  const end = ({ type, protocol, relayProtocol }) => (type === "relay" ? `relay${relayProtocol ? ` over ${relayProtocol}` : ""}` : `${type} ${protocol}`);
  return `Chosen pair: ${end(local)} ↔ ${end(remote)}${local.url ? ` · ${local.url}` : ""}`;
};

/** Ids of the relays in the pair, this side's first. */
export const relaysOf = ({ local, remote }, nodes) =>
  [local.type === "relay" && (nodeAt(nodes, local.url) ?? nodeOwning(nodes, local.address)), remote.type === "relay" && nodeOwning(nodes, remote.address)].filter(Boolean).map((node) => node.id);
