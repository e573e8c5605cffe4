// What each layer's cache holds, from lt/info and the number of tokens, and the strip that shows it.

import { $, el, number, tokens } from "./dom.js";

/** Most tokens that a streaming layer holds once the prompt was read; Infinity where no layer streams. */
export const capacity = ({ streaming }) => (streaming ? streaming.sink + streaming.window : Infinity);

/**
 * Tokens held by each layer with `n` in the context. With prefill = full a streaming layer holds what it held before and all
 * of the new prompt while that is read (`reading`, the server's prompt_progress).
 */
export function heldByLayer(info, n, reading = null) {
  const most = capacity(info);
  let streaming = Math.min(n, most);
  if (reading && info.streaming?.prefill === "full") streaming = Math.min(n, Math.min(reading.cache, most) + reading.processed - reading.cache);
  const streams = new Set(info.streaming?.layers);
  const kept = new Set(info.cache_keep);
  const own = new Set(info.own_window?.layers);
  return Array.from({ length: info.n_layer }, (_, layer) => ({
    streams: streams.has(layer), held: streams.has(layer) ? streaming : heldInFull(info, layer, n), kept: kept.has(layer), own: own.has(layer),
  }));
}

/** Tokens that a layer which doesn't stream holds: all, or those of its own sliding window. */
function heldInFull({ own_window }, layer, n) {
  return own_window?.layers.includes(layer) ? Math.min(n, own_window.tokens) : n;
}

/** Bytes of the KV cache that hold these tokens. */
export function cacheBytes(info, held) {
  return held.reduce((sum, layer, i) => sum + layer.held * (layer.streams ? info.streaming_token_bytes : info.token_bytes)[i], 0);
}

/** Bytes of the KV cache if no layer streamed. */
export const fullBytes = (info, n) => info.token_bytes.reduce((sum, bytes, layer) => sum + bytes * heldInFull(info, layer, n), 0);

export const describe = ({ streams, held, kept, own }, i, n) =>
  `layer ${i}: ${streams ? "streaming" : own ? "a window of its own" : "full"}, holds `
  + (held === n ? tokens(n) : `${number(held)} of ${tokens(n)}`) + (kept ? ", kept in 16 bits" : "");

function summary({ streaming, auto, n_layer }, reading) {
  if (!streaming) {
    return auto ? "All layers are full until the first long prompt chooses which of them stream." : "All layers hold the full cache.";
  }
  if (reading && streaming.prefill === "full") return "While a prompt is read, a streaming layer may hold all of it.";
  return `${streaming.layers.length} of ${n_layer} layers stream: they keep the first ${number(streaming.sink)} and the last ${number(streaming.window)} tokens.`
    + (auto ? " They were chosen for the first long prompt." : "");
}

let cells = [];
let shown = null;  // {info, held, n, reading}
let pointed = null;

function readout() {
  $("layer-readout").textContent = pointed === null ? summary(shown.info, shown.reading) : describe(shown.held[pointed], pointed, shown.n);
}

function point(i) {
  pointed = i;
  readout();
}

function build(count) {
  cells = Array.from({ length: count }, (_, i) => el("button", {
    type: "button", class: "cell", tabindex: i ? "-1" : "0",
    onpointerenter: () => point(i), onpointerleave: () => point(null), onfocus: () => point(i), onblur: () => point(null),
    onclick: () => point(i), onkeydown: (event) => walk(event, i),
  }, el("span", { class: "level" })));
  $("strip").replaceChildren(...cells);
  $("strip").classList.toggle("many", count > 32);
}

/** One stop of the Tab key for the whole strip; arrow keys go along it. */
function walk(event, i) {
  const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: cells.length - 1 }[event.key];
  if (to === undefined || !cells[to]) return;
  event.preventDefault();
  cells[i].tabIndex = -1;
  cells[to].tabIndex = 0;
  cells[to].focus();
}

export function renderStrip(info, held, n, reading) {
  if (cells.length !== info.n_layer) build(info.n_layer);
  shown = { info, held, n, reading };
  held.forEach((layer, i) => {
    cells[i].classList.toggle("streams", layer.streams);
    cells[i].setAttribute("aria-label", describe(layer, i, n));
    cells[i].firstChild.style.height = `${n ? Math.max(4, layer.held / n * 100) : 0}%`;
  });
  readout();
}
