// Sparklines: the last samples of one number as a line in an SVG element. Colours come from the style sheet.

/** The last `limit` samples of one number, drawn on a scale that reaches at least to `scale`. */
export class History {
  constructor(limit, scale) {
    this.limit = limit;
    this.scale = scale;
    this.samples = [];
  }

  push(value) {
    this.samples.push(value);
    if (this.samples.length > this.limit) this.samples.shift();
  }
}

const SVG = "http://www.w3.org/2000/svg";

/** Draws a history into `svg`; the newest sample is at the right edge, the scale starts at zero. */
export const spark = (svg, history) => {
  if (!svg.firstChild) {
    svg.setAttribute("viewBox", "0 0 100 100");
    svg.setAttribute("preserveAspectRatio", "none");
    for (const name of ["fill", "line"]) {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", name);
      path.setAttribute("vector-effect", "non-scaling-stroke");
      svg.append(path);
    }
  }
  const { samples, limit, scale } = history;
  const top = Math.max(...samples, scale) * 1.08;
  const x = (index) => 100 - ((samples.length - 1 - index) * 100) / (limit - 1);
  const points = samples.map((value, index) => `${x(index).toFixed(2)} ${(98 - (value / top) * 94).toFixed(2)}`);
  const [fill, line] = svg.children;
  if (points.length < 2) return;
  line.setAttribute("d", `M${points.join("L")}`);
  fill.setAttribute("d", `M${x(0).toFixed(2)} 100L${points.join("L")}L100 100Z`);
};
