// Puts the page together.

import { fetchInfo } from "./api.js";
import { edit, retry, send, stop } from "./chat.js";
import { autosize, errorLine, renderConversation, setUpConversation } from "./conversation.js";
import { setUpDocuments, showFit } from "./documents.js";
import { $, number } from "./dom.js";
import { renderPanel } from "./panel.js";
import { saveDraft, setUpSessions } from "./sessions.js";
import { setUpSettings } from "./settings.js";
import { state } from "./state.js";

async function loadInfo() {
  document.querySelector(".line.offline")?.remove();
  try {
    state.info = await fetchInfo();
  } catch (error) {
    const line = errorLine(error.message, "Retry", loadInfo);
    line.classList.add("offline");
    $("messages").append(line);
    return;
  }
  const { info } = state;
  document.title = `${info.model} – lt-gguf`;
  $("model").textContent = info.model;
  $("model-facts").textContent = `${info.architecture}, ${number(info.n_layer)} layers` + (info.streaming ? `, ${number(info.streaming.layers.length)} streaming` : "");
  $("model-facts").title = `${info.file}, lt-gguf ${info.version}`;
  if (!state.session.messages.length) renderConversation();
  renderPanel();
  showFit();
}

function setUpQuestion() {
  const field = $("question");
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", stop);
  field.addEventListener("keydown", (event) => {
    // isComposing: Enter chooses a word while Chinese, Japanese or Korean is typed.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  let counting = null;
  field.addEventListener("input", () => {
    autosize(field);
    saveDraft();
    clearTimeout(counting);
    counting = setTimeout(showFit, 800);
  });
}

/** The two sides: beside the conversation where there is room, else over it, behind a button. */
function setUpSides() {
  const sides = [["sessions", matchMedia("(min-width: 62rem)")], ["panel", matchMedia("(min-width: 78rem)")]];
  const scrim = $("scrim");

  function show(id, isShown) {
    $(id).classList.toggle("open", isShown);
    $(`${id}-toggle`).setAttribute("aria-expanded", String(isShown));
    const covered = sides.some(([side, isWide]) => !isWide.matches && $(side).classList.contains("open"));
    scrim.hidden = !covered;
    for (const under of document.querySelectorAll("main, .bar")) under.inert = covered;  // the Tab key stays in what lies over them
  }

  function closeOverlays() {
    let closed = false;
    for (const [id, isWide] of sides) {
      if (isWide.matches || !$(id).classList.contains("open")) continue;
      show(id, false);
      $(`${id}-toggle`).focus();
      closed = true;
    }
    return closed;
  }

  for (const [id, isWide] of sides) {
    show(id, isWide.matches);
    isWide.addEventListener("change", () => show(id, isWide.matches));
    $(`${id}-toggle`).addEventListener("click", () => {
      const isShown = !$(id).classList.contains("open");
      if (isShown && !isWide.matches) closeOverlays();
      show(id, isShown);
      if (isShown && !isWide.matches) $(id).querySelector("button").focus();
    });
    $(id).querySelector(".close").addEventListener("click", closeOverlays);
  }
  scrim.addEventListener("click", closeOverlays);
  document.addEventListener("session-chosen", () => {
    if (closeOverlays()) $("question").focus();
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (!closeOverlays()) stop();
  });
}

setUpConversation({ edit, retry });
setUpSettings(showFit);
setUpDocuments();
setUpQuestion();
setUpSides();
await setUpSessions();
await loadInfo();
if (matchMedia("(hover: hover)").matches) $("question").focus();
