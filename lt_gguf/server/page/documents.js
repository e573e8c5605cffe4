// Documents of the next question: dropped, chosen or pasted, and whether they fit.

import { startReading } from "./ahead.js";
import { countTokens, readDocument } from "./api.js";
import { $, announce, el, notice, number, tokens } from "./dom.js";
import { promptOf, tokensUsed } from "./prompt.js";
import { systemPrompt } from "./settings.js";
import { saveDraft } from "./sessions.js";
import { state } from "./state.js";

const ROOM = 64;  // tokens for a short question and the beginning of an answer: a document that leaves less is of no use

let pending = [];  // {name, description, text, n_tokens}, or {name, controller} while the server reads it

export const pendingDocuments = () => pending.filter((document) => !document.controller);
export const stillReading = () => pending.some((document) => document.controller);

export function setPendingDocuments(documents) {
  for (const document of pending) document.controller?.abort();
  pending = documents;
  renderChips();
  showFit();
}

/** A document's name and tokens; with `onremove` also a button that takes it away. */
export function chip(document, onremove) {
  const isReading = Boolean(document.controller);
  return el("li", { class: "chip", title: document.description ?? document.name, "aria-busy": isReading ? "true" : false },
    el("span", { class: "chip-name" }, document.name),
    el("span", { class: "muted" }, isReading ? "is read …" : tokens(document.n_tokens)),
    onremove && el("button", { type: "button", class: "quiet", "aria-label": `Remove ${document.name}`, onclick: () => onremove(document) }, "×"));
}

function renderChips() {
  $("chips").replaceChildren(...pending.map((document) => chip(document, remove)));
}

function remove(document) {
  document.controller?.abort();
  pending = pending.filter((other) => other !== document);
  renderChips();
  showFit();
  startReading();
  saveDraft();
  $("question").focus();
}

/** The whole prompt with these documents and what is typed; where the server can't count it, what is known of it. */
async function count(documents) {
  const { messages } = state.session;
  const content = $("question").value;
  if (!messages.length && !documents.length && !content.trim()) return 0;
  try {
    return await countTokens(promptOf([...messages, { role: "user", content, documents }], systemPrompt()));
  } catch {
    return tokensUsed(messages) + documents.reduce((sum, document) => sum + document.n_tokens, 0);
  }
}

let counting = 0;

/** Says beside the question how much room is left; nothing while nothing is attached. */
export async function showFit() {
  const documents = pendingDocuments();
  const turn = ++counting;
  if (!documents.length || !state.info) {
    $("fit").textContent = "";
    return;
  }
  const used = await count(documents);
  if (turn !== counting) return;  // a newer count is on its way
  const { n_ctx } = state.info;
  const sum = documents.reduce((total, document) => total + document.n_tokens, 0);
  $("fit").textContent = used <= n_ctx ? `${tokens(sum)}, ${number(n_ctx - used)} of ${number(n_ctx)} are left` : `${number(used - n_ctx)} tokens too many`;
}

/** Sends the files to the server, one after the other, and keeps those that fit. */
export async function attach(files) {
  if (!files.length) return;
  notice(null);
  const { session } = state;
  const added = [...files].map((file) => ({ name: file.name || "pasted.txt", controller: new AbortController(), file }));
  pending.push(...added);
  renderChips();
  $("question").focus();
  const refused = [];
  for (const waiting of added) {
    if (!pending.includes(waiting)) continue;  // taken away meanwhile
    let document = null;
    try {
      document = await readDocument(waiting.file, waiting.controller.signal);
      const line = await doesNotFit(document);
      if (line) {
        refused.push(line);
        document = null;
      }
    } catch (error) {
      if (error.name !== "AbortError") refused.push(error.message.includes(waiting.name) ? error.message : `${waiting.name}: ${error.message}`);
      document = null;
    }
    if (state.session !== session) return;
    pending = pending.flatMap((other) => (other !== waiting ? [other] : document ? [document] : []));
    renderChips();
    if (document) announce(`${document.name}, ${tokens(document.n_tokens)}, is attached.`);
  }
  if (refused.length) notice(refused.join(" "), true);
  showFit();
  startReading();
  saveDraft();
}

async function doesNotFit(document) {
  if (!state.info) return null;
  const { n_ctx } = state.info;
  const before = pendingDocuments();
  if (await count([...before, document]) + ROOM <= n_ctx) return null;
  const left = Math.max(0, n_ctx - await count(before));
  return `${document.name} doesn't fit: it has ${tokens(document.n_tokens)}, and ${number(left)} of ${number(n_ctx)} are left.`;
}

export function setUpDocuments() {
  $("attach").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", async () => {
    const files = [...$("files").files];
    $("files").value = "";  // so that the same file can be chosen again
    await attach(files);
  });
  addEventListener("paste", (event) => {
    // What comes with text as well, as from a word processor, is meant as text.
    if (!event.clipboardData.files.length || event.clipboardData.getData("text/plain")) return;
    event.preventDefault();
    attach([...event.clipboardData.files]);
  });
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) $("drop").hidden = true;
  });
  addEventListener("drop", (event) => {
    $("drop").hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    attach([...event.dataTransfer.files]);
  });
}
