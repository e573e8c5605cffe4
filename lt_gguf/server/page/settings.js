// System prompt, temperature and the bound of an answer: one setting for all conversations, remembered by the browser.

import { $ } from "./dom.js";

const KEY = "lt-gguf.settings";

let settings = { system: "", temperature: "", maxTokens: "" };
try {
  settings = { ...settings, ...JSON.parse(localStorage.getItem(KEY) ?? "{}") };
} catch {
  // What is no JSON any more is forgotten.
}

export const systemPrompt = () => settings.system.trim();

/** What goes along with a request; what the person left empty is left to the server. */
export function requestSettings() {
  const chosen = {};
  if (settings.temperature !== "") chosen.temperature = Number(settings.temperature);
  if (settings.maxTokens !== "") chosen.max_tokens = Number(settings.maxTokens);
  return chosen;
}

export function setUpSettings(onchange) {
  const fields = { system: $("system"), temperature: $("temperature"), maxTokens: $("max-tokens") };
  $("settings-open").addEventListener("click", () => {
    for (const [name, field] of Object.entries(fields)) field.value = settings[name];
    $("settings").showModal();
  });
  $("settings").addEventListener("close", () => {
    for (const [name, field] of Object.entries(fields)) if (field.validity.valid) settings[name] = field.value;
    localStorage.setItem(KEY, JSON.stringify(settings));
    onchange();
  });
}
