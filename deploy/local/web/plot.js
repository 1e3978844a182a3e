// Bit rate of the last two minutes on a canvas. Colours come from the style sheet, so light and dark follow.
import { bitrate } from "/shared/format.js";

/** Samples across the canvas, one a second. */
const SPAN = 120;

/** Draws the samples' rates; the newest is at the right edge, the scale starts at zero and is labelled at its top. */
export const plot = (canvas, samples) => {
  const { width, height } = canvas.getBoundingClientRect();
  if (!width) return;
  const ratio = devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const colours = getComputedStyle(document.documentElement);
  const colour = (name) => colours.getPropertyValue(name);
  const shown = samples.slice(-SPAN);
  const top = ceiling(Math.max(...shown.map((sample) => Math.max(sample.inPerSecond, sample.outPerSecond)), 12_500));
  const y = (value) => height - 3 - (value / top) * (height - 24);

  context.strokeStyle = colour("--line");
  context.lineWidth = 1;
  for (const part of [0.5, 1]) {
    context.beginPath();
    context.moveTo(0, Math.round(y(top * part)) + 0.5);
    context.lineTo(width, Math.round(y(top * part)) + 0.5);
    context.stroke();
  }
  context.fillStyle = colour("--soft");
  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  context.fillText(bitrate(top), 8, 14);

  context.lineJoin = "round";
  context.lineWidth = 2;
  for (const [field, name] of [["outPerSecond", "--out"], ["inPerSecond", "--in"]]) {
    context.strokeStyle = colour(name);
    context.beginPath();
    shown.forEach((sample, index) => context.lineTo(width - ((shown.length - 1 - index) * width) / (SPAN - 1), y(sample[field])));
    context.stroke();
  }
};

/** The next round number of bits a second above, in bytes: the scale does not jump with every sample. */
const ceiling = (bytesPerSecond) => {
  const bits = bytesPerSecond * 8;
  const power = 10 ** Math.floor(Math.log10(bits));
  return ([1, 2, 5, 10].find((step) => step * power >= bits) * power) / 8;
};
