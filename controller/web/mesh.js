// The links between relays, drawn as a ring: one line for each pair, coloured by how packets travel.
import { keyed, text } from "./keyed.js";

const WIDTH = 640;
const HEIGHT = 300;
/** With more relays than this the lines carry no figures. */
const FIGURES = 8;
const SVG = "http://www.w3.org/2000/svg";
const TONES = { direct: "good", via: "warn", plain_udp: "warn", none: "bad" };
const RANKS = ["good", "", "warn", "bad"];

const make = (name, children = []) => {
  const element = document.createElementNS(SVG, name);
  for (const child of children) element.append(document.createElementNS(SVG, child));
  return element;
};

const set = (element, values) => {
  for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
};

const rtt = (link) => (link.rtt_us ? `${(link.rtt_us / 1000).toFixed(link.rtt_us < 10_000 ? 2 : 0)} ms` : "–");

/** How one relay reaches another, for people. */
const way = (from, link) => {
  const loss = link.loss_permille ? `, ${(link.loss_permille / 10).toFixed(1)} % lost` : "";
  const how = { direct: "by its link", via: `by ${link.via}`, plain_udp: "by plain UDP", none: "not at all" }[link.path] ?? "in an unknown way";
  return `${from} reaches ${link.to} ${how}: ${rtt(link)}${loss}${link.why ? ` (${link.why})` : ""}`;
};

/** Pairs of relays with what both ends say. */
const pairs = (nodes) => {
  const found = new Map();
  const known = new Set(nodes.map((node) => node.id));
  for (const node of nodes) {
    for (const link of node.links ?? []) {
      if (!known.has(link.to)) continue;
      const ends = [node.id, link.to].sort();
      const key = ends.join(" ");
      if (!found.has(key)) found.set(key, { key, ends, says: [] });
      found.get(key).says.push([node.id, link]);
    }
  }
  return [...found.values()];
};

/** Draws the mesh into `svg`; whether there is any. */
export const drawMesh = (svg, nodes) => {
  const members = [...nodes].filter((node) => node.state !== "standby").sort((a, b) => (a.region + a.id < b.region + b.id ? -1 : 1));
  const lines = pairs(members);
  if (lines.length === 0) return false;
  set(svg, { viewBox: `0 0 ${WIDTH} ${HEIGHT}` });
  const at = new Map(
    members.map((node, index) => {
      const angle = (2 * Math.PI * index) / members.length - Math.PI;
      return [node.id, [WIDTH / 2 + Math.cos(angle) * (WIDTH / 2 - 90), HEIGHT / 2 + Math.sin(angle) * (HEIGHT / 2 - 40)]];
    }),
  );
  const [edges, dots] = [svg.querySelector("[data-part=edges]"), svg.querySelector("[data-part=dots]")];
  keyed(edges, lines, (line) => line.key, () => make("g", ["line", "text", "title"]), (element, line) => {
    const [[x1, y1], [x2, y2]] = line.ends.map((id) => at.get(id));
    const [stroke, figure, title] = element.children;
    set(stroke, { x1, y1, x2, y2 });
    const tones = line.says.map(([, link]) => (link.path === "direct" && link.loss_permille >= 10 ? "warn" : (TONES[link.path] ?? "")));
    element.dataset.tone = tones.reduce((worst, tone) => (RANKS.indexOf(tone) > RANKS.indexOf(worst) ? tone : worst), "good");
    const measured = line.says.map(([, link]) => link).find((link) => link.rtt_us);
    set(figure, { x: (x1 + x2) / 2, y: (y1 + y2) / 2 - 6 });
    text(figure, measured && members.length <= FIGURES ? rtt(measured) : "");
    text(title, line.says.map(([from, link]) => way(from, link)).join("\n"));
  });
  keyed(dots, members, (node) => node.id, () => make("g", ["circle", "text"]), (element, node) => {
    const [x, y] = at.get(node.id);
    const [circle, name] = element.children;
    set(circle, { cx: x, cy: y, r: 7 });
    set(name, { x, y: y + (y < HEIGHT / 2 - 1 ? -14 : 24) });
    text(name, node.id);
  });
  return true;
};
