// The conversations: the list, taking one up, names, export. store.js keeps them.

import { stopReading } from "./ahead.js";
import { setPendingDocuments, pendingDocuments } from "./documents.js";
import { autosize, renderConversation, scrollToEnd } from "./conversation.js";
import { $, ask, el, icon, notice } from "./dom.js";
import { renderPanel } from "./panel.js";
import { state } from "./state.js";
import * as store from "./store.js";

const CURRENT = "lt-gguf.session";
const UNNAMED = "New conversation";

const PENCIL = "M3 13l.7-3L10.5 3.2l2.3 2.3L6 12.3z";
const CROSS = "M4 4l8 8M12 4l-8 8";

const fresh = () => ({ id: newId(), title: UNNAMED, named: false, updated: Date.now(), messages: [], draft: { text: "", documents: [] } });

// crypto.randomUUID is missing on pages that come by plain HTTP from another computer.
const newId = () => `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`;

export async function saveSession(session) {
  const isEmpty = !session.messages.length && !session.draft.text && !session.draft.documents.length;
  if (isEmpty && !kept.has(session.id)) return;
  const question = session.messages.find((message) => message.role === "user");
  if (question && !session.named) session.title = titleOf(question);
  session.updated = Date.now();
  try {
    await store.save(session);
  } catch (error) {
    notice(`The browser can't keep this conversation: ${error.message}`, true);
  }
  await renderList();
}

function titleOf({ content }) {
  const line = content.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

let drafting = null;

/** Keeps what is typed and attached, so that a reload doesn't lose it. */
export function saveDraft() {
  clearTimeout(drafting);
  drafting = setTimeout(keepDraft, 400);
}

async function keepDraft() {
  clearTimeout(drafting);
  drafting = null;
  state.session.draft = { text: $("question").value, documents: pendingDocuments() };
  await saveSession(state.session);
}

function show(session) {
  state.session = session;
  localStorage.setItem(CURRENT, session.id);
  const last = session.messages.at(-1);
  if (last?.role === "assistant" && !last.figures && !last.error && !last.note) last.note = "This answer was interrupted.";
  notice(null);
  $("question").value = session.draft.text;
  autosize($("question"));
  stopReading();
  setPendingDocuments(session.draft.documents);
  renderConversation();
  renderPanel();
  scrollToEnd();
}

/**
 * Leaves the conversation as it is: an answer that is being made is stopped. Gives a promise of that, or nothing where
 * nothing is to be waited for, so that what is dropped right after is for the next conversation.
 */
function leave() {
  if (drafting) keepDraft();
  state.running?.controller.abort();
  return state.running?.done;
}

async function openSession(id) {
  if (id === state.session.id) return;
  await leave();
  const session = await store.load(id);
  if (session) show(session);
  await renderList();
  document.dispatchEvent(new Event("session-chosen"));
}

async function newSession() {
  if (state.session.messages.length || state.session.draft.documents.length) {
    const ending = leave();
    if (ending) await ending;
    show(fresh());
    await renderList();
  }
  document.dispatchEvent(new Event("session-chosen"));
  $("question").focus();
}

async function rename(row) {
  const title = await ask({ title: "Name of the conversation", ok: "Rename", value: row.title });
  if (title === null) return;
  const session = row.id === state.session.id ? state.session : await store.load(row.id);
  if (!session) return;
  Object.assign(session, { title, named: true });
  await store.save(session);
  await renderList();
}

async function remove(row) {
  if (!await ask({ title: "Delete this conversation?", text: `“${row.title}” is deleted from this browser.`, ok: "Delete" })) return;
  if (row.id === state.session.id) {
    await leave();
    show(fresh());
  }
  await store.remove(row.id);
  await renderList();
}

function timeOf(updated) {
  const date = new Date(updated);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" })
    : date.toLocaleDateString([], { day: "numeric", month: "short", year: date.getFullYear() === new Date().getFullYear() ? undefined : "numeric" });
}

let shown = "";
let kept = new Set();  // ids of what the browser has

async function renderList() {
  const rows = await store.list();
  kept = new Set(rows.map(({ id }) => id));
  const current = state.session?.id;
  // Rebuilt only where something changed: a list that is rebuilt while an answer grows takes the focus away.
  const now = JSON.stringify([current, rows.map(({ id, title, updated }) => [id, title, timeOf(updated)])]);
  if (now === shown) return;
  shown = now;
  const focused = document.activeElement?.id;
  $("session-list").replaceChildren(...rows.map((row) => el("li", { class: row.id === current ? "current" : "" },
    el("button", { type: "button", class: "open", id: `open-${row.id}`, "aria-current": row.id === current ? "true" : false, onclick: () => openSession(row.id) },
      el("span", { class: "title" }, row.title), el("time", { class: "muted", datetime: new Date(row.updated).toISOString() }, timeOf(row.updated))),
    el("span", { class: "row-actions" },
      el("button", { type: "button", class: "quiet", title: "Rename", "aria-label": `Rename ${row.title}`, onclick: () => rename(row) }, icon(PENCIL)),
      el("button", { type: "button", class: "quiet", title: "Delete", "aria-label": `Delete ${row.title}`, onclick: () => remove(row) }, icon(CROSS))))));
  if (focused) $(focused)?.focus();
}

/** The conversation as Markdown; documents by name only. */
export function markdownOf({ title, messages }) {
  const parts = [`# ${title}`];
  for (const message of messages) {
    if (message.role === "user") {
      const documents = (message.documents ?? []).map(({ name, n_tokens }) => `*Document: ${name}, ${n_tokens} tokens*`);
      parts.push("## Question", ...documents, message.content);
    } else {
      parts.push("## Answer", message.content || "*(none)*");
    }
  }
  return `${parts.join("\n\n")}\n`;
}

function exportSession() {
  const { session } = state;
  if (!session.messages.length) return notice("There is nothing to export yet.");
  const url = URL.createObjectURL(new Blob([markdownOf(session)], { type: "text/markdown" }));
  const name = session.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").toLowerCase() || "conversation";
  el("a", { href: url, download: `${name}.md` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Takes up the conversation that was open last. */
export async function setUpSessions() {
  $("session-new").addEventListener("click", newSession);
  $("session-export").addEventListener("click", exportSession);
  addEventListener("pagehide", () => { if (drafting) keepDraft(); });
  const id = localStorage.getItem(CURRENT);
  show((id && await store.load(id)) || fresh());
  await renderList();
}
