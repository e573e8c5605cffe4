// The questions and answers as they are shown.

import { $, copy, duration, el, number, speed, tokens } from "./dom.js";
import { chip } from "./documents.js";
import { renderMarkdown } from "./markdown.js";
import { state } from "./state.js";

const RENDER_EVERY = 80;  // ms: Markdown of a long answer takes a while to parse, and tokens come faster than screens change

let actions = {};
let live = null;  // the answer that grows: {article, parts, rendered, timer}

/** `actions`: edit(index, text, documents), retry(). */
export function setUpConversation(given) {
  actions = given;
}

const scroller = () => $("conversation");

function keepAtEnd(change) {
  const box = scroller();
  const wasAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (wasAtEnd) box.scrollTop = box.scrollHeight;
}

export function scrollToEnd() {
  scroller().scrollTop = scroller().scrollHeight;
}

export function renderConversation() {
  const { messages } = state.session;
  live = null;
  $("messages").replaceChildren(...(messages.length ? messages.map(article) : [welcome()]));
}

function welcome() {
  const box = el("div", { class: "welcome" }, el("p", {}, "Ask something, or drop a document anywhere on this page: text, Markdown, HTML, PDF or DOCX."));
  const streaming = state.info?.streaming;
  if (streaming) {
    const { n_layer } = state.info;
    box.append(el("p", { class: "muted" }, `${number(streaming.layers.length)} of ${number(n_layer)} layers stream: they keep the first `
      + `${number(streaming.sink)} and the last ${number(streaming.window)} tokens. The others keep all.`));
  }
  return box;
}

/** A line in place of the conversation's end, with a button: the server can't be reached, say. */
export function errorLine(text, label, onclick) {
  return el("p", { class: "error line", role: "alert" }, el("span", {}, text), el("button", { type: "button", onclick }, label));
}

function article(message, index) {
  return message.role === "user" ? question(message, index) : answer(message, index);
}

function question(message, index) {
  const body = el("div", { class: "question-text" }, message.content);
  const edit = el("button", { type: "button", class: "quiet", onclick: () => editQuestion(box, message, index) }, "Edit");
  const box = el("article", { class: "question", "aria-label": "Question" }, chips(message.documents), body, el("div", { class: "actions" }, edit));
  return box;
}

function chips(documents = [], onremove = null) {
  return documents.length ? el("ul", { class: "chips", "aria-label": "Documents" }, ...documents.map((document) => chip(document, onremove))) : null;
}

function editQuestion(box, message, index) {
  if (state.running) return;
  let documents = [...(message.documents ?? [])];
  const field = el("textarea", { "aria-label": "Question", rows: "2" });
  field.value = message.content;
  const send = () => {
    if (field.value.trim()) actions.edit(index, field.value.trim(), documents);
  };
  const cancel = () => {
    const fresh = question(message, index);
    box.replaceWith(fresh);
    fresh.querySelector("button").focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    }
  });
  field.addEventListener("input", () => autosize(field));
  const list = el("div");
  const show = () => list.replaceChildren(...[chips(documents, (gone) => {
    documents = documents.filter((document) => document !== gone);
    show();
  })].filter(Boolean));
  show();
  const follows = index + 2 < state.session.messages.length ? "What follows is dropped." : "";
  box.replaceChildren(list, field, el("div", { class: "actions" }, el("span", { class: "muted" }, follows),
    el("button", { type: "button", onclick: cancel }, "Cancel"), el("button", { type: "button", class: "primary", onclick: send }, "Ask this")));
  autosize(field);
  field.focus();
}

export function autosize(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function answer(message, index) {
  const isLast = index === state.session.messages.length - 1;
  const isLive = isLast && state.running !== null;
  const parts = {
    progress: el("div", { class: "progress" }),
    reasoning: el("details", { class: "reasoning", hidden: true }, el("summary", {}, "Reasoning"), el("div", { class: "markdown" })),
    text: el("div", { class: "markdown" }),
  };
  const box = el("article", { class: "answer", "aria-label": "Answer", "aria-busy": isLive ? "true" : "false" }, parts.progress, parts.reasoning, parts.text);
  fill(parts, message);
  if (isLive) {
    live = { parts, rendered: 0, timer: null };
    return box;
  }
  if (message.note) box.append(el("p", { class: "note muted" }, message.note));
  if (message.error) box.append(errorLine(message.error, "Retry", () => actions.retry()));
  const buttons = el("div", { class: "actions" });
  if (message.content) {
    const button = el("button", { type: "button", class: "quiet", onclick: () => copy(message.content, button) }, "Copy");
    buttons.append(button);
  }
  if (isLast && !message.error) buttons.append(el("button", { type: "button", class: "quiet", onclick: () => actions.retry() }, "Retry"));
  if (message.figures) buttons.append(el("span", { class: "muted" }, summary(message.figures)));
  if (buttons.childElementCount) box.append(buttons);
  return box;
}

function summary({ read, generated, generatedPerSecond }) {
  return `read ${number(read)}, generated ${tokens(generated)}` + (generatedPerSecond ? `, ${speed(generatedPerSecond)}` : "");
}

function fill({ reasoning, text }, message) {
  if (message.reasoning) {
    reasoning.hidden = false;
    renderMarkdown(reasoning.lastElementChild, message.reasoning);
  }
  if (message.content) renderMarkdown(text, message.content);
}

/** The answer has grown. */
export function updateAnswer(message) {
  if (!live || live.timer) return;
  const current = live;
  current.timer = setTimeout(() => {
    current.timer = null;
    if (live !== current) return;
    keepAtEnd(() => fill(current.parts, message));
  }, RENDER_EVERY);
}

/** How far reading the prompt is; null when it is over. */
export function updateProgress(progress, secondsLeft) {
  if (!live) return;
  const box = live.parts.progress;
  if (!progress) {
    box.replaceChildren();
    return;
  }
  if (!box.firstChild) box.append(el("progress", { max: "1", "aria-label": "Reading" }), el("p", { class: "muted" }));
  const { processed, total, cache } = progress;
  keepAtEnd(() => {
    // Until the first progress comes, the server may be busy with another conversation: no value, so the bar moves.
    if (total) box.firstChild.value = processed / total;
    box.lastChild.textContent = total
      ? `Reads ${number(processed)} of ${tokens(total)}` + (cache ? `, ${number(cache)} of them known` : "") + (secondsLeft > 1 ? `, about ${duration(secondsLeft)} left` : "")
      : "Waits for the server";
  });
}
