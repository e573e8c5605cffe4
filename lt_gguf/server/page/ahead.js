// Documents are read while their question is typed, so that its answer begins at once.

import { readAhead } from "./api.js";
import { pendingDocuments } from "./documents.js";
import { $, announce } from "./dom.js";
import { promptOf } from "./prompt.js";
import { systemPrompt } from "./settings.js";
import { state } from "./state.js";

const SHOW_AFTER = 300;  // ms: reading that is over sooner needs no word

let reading = null;  // {prompt, controller, begun, progress, beginning, done, isOver, onprogress}: what is or was read last

/** The conversation up to the question that will follow these documents. */
function promptBefore(documents) {
  return promptOf([...state.session.messages, { role: "user", content: "", documents }], systemPrompt());
}

/** Whether all of `prompt` stands at the beginning of `longer`. */
export function begins(longer, prompt) {
  const before = prompt.slice(0, -1);
  const last = longer[prompt.length - 1];
  return last?.role === prompt.at(-1).role && longer.length === prompt.length && last.content.startsWith(prompt.at(-1).content)
    && before.every(({ role, content }, i) => longer[i].role === role && longer[i].content === content);
}

/** Has the documents of the next question read, unless an answer is being made, which has the server to itself. */
export async function startReading() {
  const documents = pendingDocuments();
  if (state.running || !documents.length) return stopReading();
  const prompt = promptBefore(documents);
  if (reading && begins(prompt, reading.prompt)) {
    if (reading.prompt.at(-1).content === prompt.at(-1).content) return;
    await reading.done;  // what is read of it serves this, too
    if (state.running || JSON.stringify(promptBefore(pendingDocuments())) !== JSON.stringify(prompt)) return;
  }
  stopReading();
  const now = { prompt, controller: new AbortController(), begun: performance.now(), progress: null, beginning: null, isOver: false, onprogress: null };
  reading = now;
  now.done = (async () => {
    try {
      for await (const chunk of readAhead(prompt, [...prompt.at(-1).content].length, now.controller.signal)) {
        if (chunk.prompt_progress) now.progress = chunk.prompt_progress;
        if (chunk.lt_begun) now.beginning = chunk.lt_begun;
        now.onprogress?.(now.progress);
        if (reading === now) show(now);
      }
    } catch {
      // The question will be told what is wrong, or has it read.
    }
    now.isOver = true;
    if (reading === now) show(now);
  })();
}

/** Nothing is read ahead any more. */
export function stopReading() {
  reading?.controller.abort();
  reading = null;
  $("ahead").textContent = "";
}

/**
 * Waits until what is being read of `prompt` has been, or stops reading where it is something else. Gives what that took, as the
 * server says it; null where nothing was read. `onprogress` gets its progress.
 */
export async function finishReading(prompt, signal, onprogress) {
  const now = reading;
  if (!now || !begins(prompt, now.prompt)) {
    stopReading();
    return null;
  }
  now.onprogress = onprogress;
  show(now);
  signal.addEventListener("abort", stopReading, { once: true });
  if (now.progress && !now.isOver) onprogress(now.progress);
  await now.done;
  signal.removeEventListener("abort", stopReading);
  stopReading();
  return now.beginning;
}

function show({ progress, begun, isOver, beginning, onprogress }) {
  if (onprogress) $("ahead").textContent = "";  // the conversation shows it
  else if (isOver) {
    $("ahead").textContent = beginning ? "read" : "";
    if (beginning) announce("The documents have been read.");
  } else if (progress && performance.now() - begun > SHOW_AFTER) {
    $("ahead").textContent = `is read: ${Math.floor(100 * progress.processed / progress.total)} %`;
  }
}
