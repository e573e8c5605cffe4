// What makes the model different, in figures: layers, memory, context, and what the last answer took.

import { chart } from "./chart.js";
import { figuresOf } from "./chat.js";
import { $, bytes, duration, el, number, speed, tokens } from "./dom.js";
import { cacheBytes, fullBytes, heldByLayer, renderStrip } from "./layers.js";
import { tokensUsed } from "./prompt.js";
import { state } from "./state.js";

function fill(box, share) {
  const bar = el("span", { class: "fill" });
  bar.style.width = `${Math.min(100, share * 100)}%`;
  return el("span", { class: `track ${box}`, "aria-hidden": "true" }, bar);
}

function figure(list, name, value, detail = null) {
  list.append(el("dt", {}, name), el("dd", {}, value, detail));
}

export function renderPanel() {
  const { info, session, running } = state;
  if (!info || !session) return;
  $("panel").classList.add("ready");
  const figures = running ? figuresOf(running) : session.messages.findLast((message) => message.figures)?.figures ?? null;
  const n = running && figures ? figures.used : tokensUsed(session.messages);
  const reading = running?.first === null ? running.progress : null;

  const held = heldByLayer(info, n, reading);
  renderStrip(info, held, n, reading);
  renderCache(info, n, held);
  const answers = session.messages.flatMap((message) => (message.figures ? [message.figures.used] : [])).filter((used) => used <= info.n_ctx);
  $("chart").replaceChildren(chart(info, Math.min(n, info.n_ctx), answers));
  $("context").replaceChildren(el("p", { id: "context-used" }, `${number(n)} of ${number(info.n_ctx)} tokens`), fill("context", n / info.n_ctx));
  renderAnswer(figures);
}

function renderCache(info, n, held) {
  const list = el("dl", { id: "cache-figures", class: "bars" });
  $("cache-types").textContent = info.cache === "f16" ? "" : info.cache;
  // Before anything is said: what the whole context will take.
  $("cache-at").textContent = n ? `with ${tokens(n)}` : "when the context is full";
  const [now, full] = n ? [cacheBytes(info, held), fullBytes(info, n)]
    : [cacheBytes(info, heldByLayer(info, info.n_ctx)), fullBytes(info, info.n_ctx)];
  if (info.streaming) figure(list, "this model", bytes(now), fill("hybrid", full ? now / full : 0));
  figure(list, "full attention", bytes(full), fill("full", full ? 1 : 0));
  if (info.streaming) {
    const saved = Math.round((1 - now / full) * 100);
    figure(list, "saved", saved > 0 ? `${saved}%` : "nothing yet");
  }
  $("cache-figures").replaceWith(list);
}

function renderAnswer(figures) {
  const list = $("answer-figures");
  list.replaceChildren();
  if (!figures) {
    list.append(el("dt", { class: "muted" }, "None yet."));
    return;
  }
  const values = {
    read: ["tokens read", number(figures.read)],
    cached: ["reused, not read again", number(figures.cached)],
    generated: ["tokens generated", number(figures.generated)],
    reading: ["reading", figures.readPerSecond ? speed(figures.readPerSecond) : "–"],
    generating: ["generating", figures.generatedPerSecond ? speed(figures.generatedPerSecond) : "–"],
    first: ["first token after", figures.firstMs === null ? "–" : duration(figures.firstMs / 1000)],
  };
  // The names are for whoever reads the figures from the page, as the check in a browser does.
  for (const [key, [name, value]] of Object.entries(values)) list.append(el("dt", {}, name), el("dd", { "data-figure": key }, value));
}
