// The server. Paths are relative, so that the page also works behind a proxy under another path.

import { ask } from "./dom.js";

const KEY = "lt-gguf.key";

/** What the server said, or that it can't be reached; `message` is one line for the person. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let key = sessionStorage.getItem(KEY);
let asking = null;  // one dialog, however many requests wait for the key

function askKey(refused) {
  asking ??= ask({
    title: "API key",
    text: refused ? "The server doesn't take this key." : "The server asks for its API key. It is kept until this tab is closed.",
    ok: "Use this key",
    value: "",
    type: "password",
  }).then((given) => {
    if (given !== null) {
      key = given;
      sessionStorage.setItem(KEY, key);
    }
    return given;
  }).finally(() => { asking = null; });
  return asking;
}

function messageOf(error, status) {
  const text = typeof error === "string" ? error : error?.message;
  if (text) return text.split("\n")[0];
  return status === 503 ? "The server is starting." : `The server answered ${status}.`;
}

async function request(path, options = {}) {
  for (;;) {
    const used = key;
    const headers = { ...options.headers };
    if (used) headers.Authorization = `Bearer ${used}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server can't be reached. Is it still running?");
    }
    if (response.status === 401) {
      if (used === key && await askKey(Boolean(used)) === null) throw new ServerError("The server asks for its API key.", 401);
      continue;
    }
    if (response.ok) return response;
    let error = null;
    try {
      error = (await response.json()).error;
    } catch {
      // No JSON: something between here and the server answered.
    }
    throw new ServerError(messageOf(error, response.status), response.status);
  }
}

const post = (path, value, signal) => request(path, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value), signal,
});

export async function fetchInfo() {
  return (await request("lt/info")).json();
}

/** The text of a file: {name, text, description, n_tokens}. */
export async function readDocument(file, signal) {
  return (await request("lt/document", {
    method: "POST", headers: { "X-Filename": encodeURIComponent(file.name) }, body: file, signal,
  })).json();
}

/** How many tokens the whole prompt has, as the chat template makes it. */
export async function countTokens(messages, signal) {
  return (await (await post("lt/tokens", { messages }, signal)).json()).n_tokens;
}

/** Reads what a prompt begins with before its question is there: progress as it comes. Nothing comes where that is of no use. */
export async function* readAhead(messages, nCharacters, signal) {
  const response = await post("lt/read", { messages, lt_read_first: nCharacters }, signal);
  if (response.status !== 204) yield* chunks(response);
}

/** The chunks of an answer as they come. Throws ServerError, also where the stream ends early. */
export async function* complete(messages, settings, signal) {
  yield* chunks(await post("v1/chat/completions", {
    messages, ...settings, stream: true, stream_options: { include_usage: true }, return_progress: true, cache_prompt: true,
  }, signal));
}

async function* chunks(response) {
  const lost = () => new ServerError("The connection to the server was lost before the answer was complete.");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw lost();
    }
    if (part.done) throw lost();
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const [, field, value] = /^(data|error): ?(.*)$/.exec(line.trimEnd()) ?? [];
      if (!field) continue;
      if (value === "[DONE]") return;
      let chunk;
      try {
        chunk = JSON.parse(value);
      } catch {
        throw new ServerError(field === "error" ? value : "The server's answer can't be understood.");
      }
      if (field === "error" || chunk.error) throw new ServerError(messageOf(chunk.error ?? chunk, 500), chunk.error?.code ?? 0);
      yield chunk;
    }
  }
}
