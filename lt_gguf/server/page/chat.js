// Sending, stopping, editing and answering again.

import { finishReading, startReading } from "./ahead.js";
import { complete, fetchInfo, ServerError } from "./api.js";
import { autosize, renderConversation, scrollToEnd, updateAnswer, updateProgress } from "./conversation.js";
import { pendingDocuments, setPendingDocuments, showFit, stillReading } from "./documents.js";
import { $, announce, notice } from "./dom.js";
import { renderPanel } from "./panel.js";
import { beginningOf, promptOf } from "./prompt.js";
import { saveSession } from "./sessions.js";
import { requestSettings, systemPrompt } from "./settings.js";
import { state } from "./state.js";

const SAVE_EVERY = 2000;   // ms: what was said so far survives a closed tab
const PANEL_EVERY = 250;   // ms
const SHOW_AFTER = 300;    // ms: reading that is over sooner needs no bar

/** The question that is typed, with its documents. */
export async function send() {
  const field = $("question");
  const content = field.value.trim();
  if (state.running) return;
  if (stillReading()) return notice("A document is still being read.");
  if (!content) return pendingDocuments().length ? notice("What do you want to know about it?") : undefined;
  notice(null);
  state.session.messages.push({ role: "user", content, documents: pendingDocuments() });
  field.value = "";
  autosize(field);
  setPendingDocuments([]);
  state.session.draft = { text: "", documents: [] };
  await answer();
}

/** Asks another question in place of an earlier one; what followed it goes. */
export async function edit(index, content, documents) {
  if (state.running) return;
  state.session.messages.splice(index, Infinity, { role: "user", content, documents });
  await answer();
}

/** Answers the last question again. */
export async function retry() {
  if (state.running) return;
  const { messages } = state.session;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  await answer();
}

export function stop() {
  state.running?.controller.abort();
}

async function answer() {
  const { session } = state;
  const prompt = promptOf(session.messages, systemPrompt());
  const first = beginningOf(session.messages, prompt);  // the server keeps it, so that another question doesn't read it again
  const message = { role: "assistant", content: "", reasoning: "" };
  session.messages.push(message);
  const run = { controller: new AbortController(), begun: performance.now(), first: null, progress: null, progressAt: 0, generated: 0, timings: null };
  state.running = run;
  showRunning(true);
  renderConversation();
  scrollToEnd();
  announce("The model reads.");
  run.done = (async () => {
    const tick = setInterval(() => showProgress(run), 500);
    const saving = setInterval(() => saveSession(session), SAVE_EVERY);
    try {
      await saveSession(session);
      run.beginning = await finishReading(prompt, run.controller.signal, (progress) => take({ prompt_progress: progress }, message, run));
      run.controller.signal.throwIfAborted();
      for await (const chunk of complete(prompt, first ? { ...requestSettings(), lt_read_first: first } : requestSettings(), run.controller.signal)) take(chunk, message, run);
    } catch (error) {
      if (error.name === "AbortError") message.note = "Stopped.";
      else if (error instanceof ServerError) message.error = error.message;
      else {
        message.error = `The page failed: ${error.message}`;
        console.error(error);
      }
    } finally {
      clearInterval(tick);
      clearInterval(saving);
    }
    message.figures = figuresOf(run);
    await saveSession(session);
    state.running = null;
  })();
  await run.done;
  showRunning(false);
  if (state.session !== session) return;
  renderConversation();
  scrollToEnd();
  renderPanel();
  showFit();
  startReading();
  announce(message.error ?? (message.note === "Stopped." ? "Stopped." : `Answer: ${message.content}`));
  // Which layers stream may have been chosen for this prompt, and a server that was restarted may have another model.
  if (!message.error) await refreshInfo();
}

function showRunning(isRunning) {
  document.body.classList.toggle("running", isRunning);  // questions can't be edited while one is answered
  // The button that had the focus goes.
  const [from, to] = isRunning ? [$("send"), $("stop")] : [$("stop"), $("send")];
  const hadFocus = document.activeElement === from;
  from.hidden = true;
  to.hidden = false;
  if (hadFocus) $("question").focus();
}

async function refreshInfo() {
  try {
    state.info = await fetchInfo();
    renderPanel();
  } catch {
    // The answer is there; the next request says what is wrong.
  }
}

function take(chunk, message, run) {
  if (chunk.prompt_progress) {
    run.progress = chunk.prompt_progress;
    run.progressAt = performance.now();
    showProgress(run);
  }
  const choice = chunk.choices?.[0];
  const { content, reasoning_content: reasoning } = choice?.delta ?? {};
  if (content || reasoning) {
    if (run.first === null) {
      run.first = performance.now();
      updateProgress(null);
    }
    run.generated += 1;
    message.content += content ?? "";
    message.reasoning += reasoning ?? "";
    updateAnswer(message);
    showPanel(run);
  }
  if (choice?.finish_reason === "length") message.note = "The answer ends at its bound, or at the end of the context.";
  if (chunk.lt_begun && !run.beginning?.prompt_n) run.beginning = chunk.lt_begun;  // else it was read while the question was typed
  if (chunk.timings) run.timings = chunk.timings;
}

function showProgress(run) {
  const now = performance.now();
  if (run.first !== null || now - run.begun < SHOW_AFTER) return;
  const { progress } = run;
  let left = null;
  if (progress && progress.time_ms > 500 && progress.processed > progress.cache) {
    const perToken = progress.time_ms / (progress.processed - progress.cache);
    left = (perToken * (progress.total - progress.processed) - (now - run.progressAt)) / 1000;
  }
  updateProgress(progress ?? {}, left);
  showPanel(run);
}

function showPanel(run) {
  const now = performance.now();
  if (now - (run.panelAt ?? 0) < PANEL_EVERY) return;
  run.panelAt = now;
  renderPanel();
}

/** What an answer cost: the server's timings; of an answer that was stopped, what was seen of it. Null where nothing was read. */
export function figuresOf({ begun, first, progress, generated, timings, beginning }) {
  const firstMs = first === null ? null : first - begun;
  if (timings) {
    // What the server read of the documents before, it then found there.
    const ahead = beginning?.prompt_n ?? 0;
    const read = timings.prompt_n + ahead;
    const readMs = timings.prompt_ms + (ahead ? beginning.prompt_ms : 0);
    return {
      cached: timings.cache_n - ahead, read, readPerSecond: readMs ? read / readMs * 1000 : null, generated: timings.predicted_n,
      generatedPerSecond: timings.predicted_per_second, firstMs, used: timings.cache_n + timings.prompt_n + timings.predicted_n,
    };
  }
  if (!progress) return null;
  const read = progress.processed - progress.cache;
  const seconds = first === null ? 0 : (performance.now() - first) / 1000;
  return {
    cached: progress.cache, read, readPerSecond: progress.time_ms ? read / progress.time_ms * 1000 : null, generated,
    generatedPerSecond: generated > 1 && seconds ? generated / seconds : null, firstMs, used: progress.processed + generated,
  };
}
