// The map: regions where they lie (or in a ring, where nobody has said), their relays with state and load, and the links between
// relays coloured by how packets travel. Drawn in CSS pixels, so that letters are as large on a phone.
import { bitrate, count, plural } from "./format.js";
import { keyed, text } from "./keyed.js";

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = 26;
/** Room for the name below a region, and half its width. */
const NAME = 34;
const LABEL = 60;
/** With more relays in a region than this only regions have names. */
const NAMED = 6;
const TONES = { direct: "good", via: "warn", plain_udp: "warn", none: "bad" };
const RANKS = ["good", "", "warn", "bad"];
const STATES = { ready: "good", draining: "warn", overloaded: "warn", suspect: "warn", lost: "bad" };
const WAYS = { direct: "direct", via: "by", plain_udp: "plain UDP", none: "none" };

const make = (name, children = []) => {
  const element = document.createElementNS(SVG, name);
  for (const child of children) element.append(document.createElementNS(SVG, child));
  return element;
};

const set = (element, values) => {
  for (const [name, value] of Object.entries(values)) element.setAttribute(name, typeof value === "number" ? value.toFixed(1) : value);
};

const worse = (a, b) => (RANKS.indexOf(b) > RANKS.indexOf(a) ? b : a);

/** A round trip in microseconds, for people. */
const rtt = (us) => (us ? `${(us / 1000).toFixed(us < 10_000 ? 2 : 0)} ms` : "–");

const toneOf = (link) => (link.path === "direct" && link.loss_permille >= 10 ? "warn" : (TONES[link.path] ?? ""));

/** How one relay reaches another, for people. */
const way = (from, link) => {
  const loss = link.loss_permille ? `, ${(link.loss_permille / 10).toFixed(1)} % lost` : "";
  const how = { direct: "by its link", via: `by ${link.via}`, plain_udp: "by plain UDP", none: "not at all" }[link.path] ?? "in an unknown way";
  return `${from} reaches ${link.to} ${how}: ${rtt(link.rtt_us)}${loss}${link.why ? ` (${link.why})` : ""}`;
};

/** Pairs of relays with what both ends say. */
const pairs = (nodes) => {
  const found = new Map();
  const regionOf = new Map(nodes.map((node) => [node.id, node.region]));
  for (const node of nodes) {
    for (const link of node.links ?? []) {
      if (!regionOf.has(link.to)) continue;
      const ends = [node.id, link.to].sort();
      const key = ends.join(" ");
      if (!found.has(key)) found.set(key, { key, ends, regions: ends.map((id) => regionOf.get(id)).sort(), says: [], tone: "good" });
      const pair = found.get(key);
      pair.says.push([node.id, link]);
      pair.tone = worse(pair.tone, toneOf(link));
    }
  }
  return [...found.values()];
};

/** Where regions are drawn: `Map` from name to `{ x, y, radius }`. Pure. */
export const layout = (regions, width, height) => {
  const largest = Math.min(64, width / 8, height / 3.6);
  const radius = (relays) => Math.min(largest, relays === 1 ? 26 : 32 + 15 * Math.sqrt(relays - 1));
  const placed = regions.length > 1 && regions.every((region) => region.place);
  const spots = regions.map((region, index) => {
    const r = radius(region.relays);
    if (placed) return { x: region.place[1], y: -region.place[0], radius: r };
    // One in the middle, two side by side, more in a ring that begins on the left.
    const angle = Math.PI + (2 * Math.PI * index) / regions.length;
    const far = regions.length === 1 ? 0 : 1;
    return { x: far * Math.cos(angle), y: far * Math.sin(angle), radius: r };
  });
  const spread = (axis, from, to) => {
    const values = spots.map((spot) => spot[axis]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    for (const spot of spots) spot[axis] = high - low < 1e-6 ? (from + to) / 2 : from + ((spot[axis] - low) / (high - low)) * (to - from);
  };
  const side = Math.max(LABEL, largest);
  spread("x", side, width - side);
  spread("y", MARGIN / 2 + largest, height - MARGIN / 2 - NAME - largest);
  // Places that are close on the globe are pushed apart on the page.
  for (let round = 0; round < 40; round += 1) {
    for (const a of spots) {
      for (const b of spots) {
        const [dx, dy] = [b.x - a.x, b.y - a.y];
        const apart = Math.hypot(dx, dy);
        const wanted = a.radius + b.radius + NAME;
        if (a === b || apart >= wanted) continue;
        const push = (wanted - apart) / 2;
        const [ux, uy] = apart > 0.01 ? [dx / apart, dy / apart] : [1, 0];
        a.x -= ux * push;
        a.y -= uy * push;
        b.x += ux * push;
        b.y += uy * push;
      }
    }
    for (const spot of spots) {
      spot.x = Math.min(width - side, Math.max(side, spot.x));
      spot.y = Math.min(height - NAME - spot.radius, Math.max(MARGIN / 2 + spot.radius, spot.y));
    }
  }
  return new Map(regions.map((region, index) => [region.name, spots[index]]));
};

/** Where relays are drawn in their region. */
const seats = (nodes, spots) => {
  const at = new Map();
  for (const [name, spot] of spots) {
    const own = nodes.filter((node) => node.region === name);
    own.forEach((node, index) => {
      const angle = (2 * Math.PI * index) / own.length - Math.PI / 2;
      const far = own.length === 1 ? 0 : spot.radius - 20;
      const [dx, dy] = [far * Math.cos(angle), far * Math.sin(angle)];
      // Its name stands beside it, towards the nearer edge.
      at.set(node.id, [spot.x + dx, spot.y + dy, dx < -1 ? -1 : 1]);
    });
  }
  return at;
};

const drawRegions = (group, regions, spots) =>
  keyed(group, regions, (region) => region.name, () => make("g", ["circle", "text", "text", "title"]), (element, region) => {
    const { x, y, radius } = spots.get(region.name);
    const [circle, name, summary, title] = element.children;
    element.dataset.tone = region.ready === 0 ? "bad" : region.ready < region.relays ? "warn" : "good";
    set(circle, { cx: x, cy: y, r: radius });
    set(name, { x, y: y + radius + 15, class: "name" });
    set(summary, { x, y: y + radius + 29, class: "small" });
    text(name, region.alone ? `${region.name} · ${region.alone}` : region.name);
    text(summary, `${region.ready} of ${region.relays} ready · ${count(region.allocations)}`);
    text(title, `${region.name}: ${region.ready} of ${plural(region.relays, "relay")} ready, ${plural(region.allocations, "allocation")}, ${bitrate(region.bytes)}`);
  });

const drawRelays = (group, nodes, at, crowd) =>
  keyed(group, nodes, (node) => node.id, () => make("g", ["circle", "circle", "text", "title"]), (element, node) => {
    const [x, y, side] = at.get(node.id);
    const [load, dot, name, title] = element.children;
    const busy = Math.min(1, (node.cpu_permille ?? 0) / 1000);
    element.dataset.tone = STATES[node.state] ?? "";
    // The ring is its processor: closed when it is full.
    set(load, { cx: x, cy: y, r: 10, class: "load", pathLength: 100, "stroke-dasharray": `${(busy * 100).toFixed(0)} 100`, transform: `rotate(-90 ${x.toFixed(1)} ${y.toFixed(1)})` });
    set(dot, { cx: x, cy: y, r: 6.5, class: "dot" });
    set(name, { x: x + 14 * side, y: y + 4, class: `small label ${side < 0 ? "end" : "start"}` });
    const alone = crowd.get(node.region) === 1;
    text(name, !alone && crowd.get(node.region) <= NAMED ? node.id : "");
    text(title, `${node.id}: ${node.state}, ${plural(node.allocations ?? 0, "allocation")}, ${bitrate(node.bytes_per_second)}, CPU ${(busy * 100).toFixed(0)} %`);
  });

const drawEdges = (edges, figures, lines, at, spots) => {
  keyed(edges, lines, (line) => line.key, () => make("g", ["line", "title"]), (element, line) => {
    const [[x1, y1], [x2, y2]] = line.ends.map((id) => at.get(id));
    const [stroke, title] = element.children;
    set(stroke, { x1, y1, x2, y2 });
    element.dataset.tone = line.tone;
    text(title, line.says.map(([from, link]) => way(from, link)).join("\n"));
  });
  // One figure for all links between two regions: the shortest round trip.
  const between = new Map();
  for (const line of lines.filter(({ regions: [a, b] }) => a !== b)) {
    const key = line.regions.join(" ");
    const measured = line.says.map(([, link]) => link.rtt_us).filter((us) => us > 0);
    const known = between.get(key) ?? { key, regions: line.regions, us: Infinity };
    known.us = Math.min(known.us, ...measured);
    between.set(key, known);
  }
  const shown = [...between.values()].filter(({ us }) => us < Infinity);
  keyed(figures, shown, ({ key }) => key, () => make("text"), (element, { regions, us }) => {
    const [a, b] = regions.map((name) => spots.get(name));
    set(element, { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 + 4, class: "figure-on-line" });
    text(element, rtt(us));
  });
};

const drawRows = (body, nodes) => {
  const rows = nodes.flatMap((node) => (node.links ?? []).map((link) => ({ from: node.id, ...link })));
  const create = () => {
    const row = document.createElement("tr");
    for (const [name, kind] of [["From", ""], ["To", ""], ["Path", ""], ["Round trip", "number"], ["Lost", "number"], ["Why", "wide"]]) {
      const cell = row.insertCell();
      cell.dataset.name = name;
      cell.className = kind;
    }
    return row;
  };
  keyed(body, rows, ({ from, to }) => `${from} ${to}`, create, (row, link) => {
    const [from, to, path, trip, lost, why] = row.cells;
    text(from, link.from);
    text(to, link.to);
    text(path, link.path === "via" ? `by ${link.via}` : (WAYS[link.path] ?? link.path));
    text(trip, rtt(link.rtt_us));
    text(lost, `${((link.loss_permille ?? 0) / 10).toFixed(1)} %`);
    text(why, link.why || "–");
  });
  return rows.length;
};

/** Draws the map into the elements of its section; whether there is anything to draw. */
export const drawMap = (nodes, known) => {
  const svg = document.getElementById("mesh-map");
  const members = nodes.filter((node) => node.state !== "standby").sort((a, b) => (a.region + a.id < b.region + b.id ? -1 : 1));
  if (members.length === 0) return false;
  const names = [...new Set(members.map((node) => node.region))].sort();
  const places = new Map(known.map((region) => [region.name, region.place]));
  const regions = names.map((name) => {
    const own = members.filter((node) => node.region === name);
    const total = (field) => own.reduce((sum, node) => sum + (node[field] ?? 0), 0);
    const ready = own.filter((node) => node.state === "ready").length;
    return { name, alone: own.length === 1 ? own[0].id : null, place: places.get(name) ?? null, relays: own.length, ready, allocations: total("allocations"), bytes: total("bytes_per_second") };
  });
  const width = Math.max(280, svg.parentElement.clientWidth);
  const height = regions.length === 1 ? 200 : Math.min(380, Math.max(width < 600 ? 340 : 250, width * 0.34));
  svg.setAttribute("viewBox", `0 0 ${width} ${height.toFixed(0)}`);
  svg.style.height = `${height.toFixed(0)}px`;
  const spots = layout(regions, width, height);
  const at = seats(members, spots);
  const group = (name) => svg.querySelector(`[data-part=${name}]`);
  const lines = pairs(members);
  drawRegions(group("regions"), regions, spots);
  drawEdges(group("edges"), group("figures"), lines, at, spots);
  drawRelays(group("dots"), members, at, new Map(regions.map((region) => [region.name, region.relays])));
  document.getElementById("links").hidden = drawRows(document.getElementById("link-rows"), members) === 0;
  const bad = lines.filter((line) => line.tone !== "good").length;
  const summary = regions.map((region) => `${region.name}: ${region.ready} of ${plural(region.relays, "relay")} ready, ${plural(region.allocations, "allocation")}`);
  text(document.getElementById("mesh-summary"), `${summary.join("; ")}. ${plural(lines.length, "link")} between relays, ${bad ? `${bad} of them not direct or with losses` : "all direct"}.`);
  return true;
};
