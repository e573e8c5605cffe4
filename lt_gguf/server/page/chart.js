// Two lines over the tokens in the context: the KV cache of full attention, and of this model.

import { bytes, number } from "./dom.js";
import { cacheBytes, capacity, fullBytes, heldByLayer } from "./layers.js";

const WIDTH = 280, HEIGHT = 150, LEFT = 4, RIGHT = 4, TOP = 14, BOTTOM = 20, LABEL = 115;
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, text = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

/** A round number that isn't smaller: 1, 2 or 5 times a power of ten. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= value);
}

/** The chart with `n` tokens in the context now; `answers`: tokens in the context after each answer. */
export function chart(info, n, answers) {
  const hybrid = (tokens) => cacheBytes(info, heldByLayer(info, tokens));
  const full = (tokens) => fullBytes(info, tokens);
  // Far enough to the right to see the lines part; a context of 128K would squeeze a short conversation into the corner.
  const knee = capacity(info);
  const most = !n ? info.n_ctx : Math.min(info.n_ctx, roundUp(Math.max(1.25 * n, Number.isFinite(knee) ? 3 * knee : 0, 1000)));
  const x = (tokens) => LEFT + tokens / most * (WIDTH - LEFT - RIGHT);
  const y = (size) => HEIGHT - BOTTOM - size / full(most) * (HEIGHT - TOP - BOTTOM);
  const path = (size, from, to) => [from, ...[knee].filter((k) => k > from && k < to), to]
    .map((tokens, i) => `${i ? "L" : "M"}${x(tokens).toFixed(1)} ${y(size(tokens)).toFixed(1)}`).join("");

  const label = n ? `KV cache at ${number(n)} tokens: this model ${bytes(hybrid(n))}, full attention ${bytes(full(n))}.`
    : `KV cache at ${number(most)} tokens: this model ${bytes(hybrid(most))}, full attention ${bytes(full(most))}.`;
  const image = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", "aria-label": label });
  image.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, class: "axis" }));
  const lines = [["full", full], ...(info.streaming ? [["hybrid", hybrid]] : [])];
  for (const [name, size] of lines) {
    image.append(svg("path", { d: path(size, n, most), class: `line ahead ${name}` }));
    if (n) image.append(svg("path", { d: path(size, 0, Math.min(n, most)), class: `line ${name}` }));
    for (const after of answers) image.append(svg("circle", { cx: x(after), cy: y(size(after)), r: 2.5, class: `dot ${name}` }));
    if (n) image.append(svg("circle", { cx: x(n), cy: y(size(n)), r: 4, class: `dot ${name}` }));
  }
  image.append(svg("text", { x: WIDTH - RIGHT, y: TOP - 4, class: "name full", "text-anchor": "end" }, `full attention, ${bytes(full(most))}`));
  if (info.streaming) {
    const below = y(hybrid(most * (1 - LABEL / WIDTH))) + 14;  // the line rises to the right: under the label's left end it is lowest
    image.append(svg("text", { x: WIDTH - RIGHT, y: Math.min(below, HEIGHT - BOTTOM - 4), class: "name hybrid", "text-anchor": "end" }, `this model, ${bytes(hybrid(most))}`));
  }
  image.append(svg("text", { x: LEFT, y: HEIGHT - 6, class: "tick" }, "0"));
  image.append(svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, class: "tick", "text-anchor": "end" }, `${number(most)} tokens`));
  return image;
}
