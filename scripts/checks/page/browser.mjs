// A headless Chromium and what the check does with the page.

import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

export class Failed extends Error {}

export function expect(condition, line) {
  if (!condition) throw new Failed(line);
}

export async function openPage(url) {
  const browser = await puppeteer.launch({ args: chromium.args, executablePath: await chromium.executablePath(), headless: "shell" });
  const page = await browser.newPage();
  await page.setViewport({ width: 1440, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "light" }]);
  page.setDefaultTimeout(20_000);

  const complaints = [];
  page.on("pageerror", (error) => complaints.push(`the page failed: ${error.message}`));
  page.on("console", (message) => {
    // Answers of 401 and 503 are made by the check itself; the browser reports each.
    if (message.type() === "error" && !/status of (401|503)/.test(message.text())) complaints.push(`the console says: ${message.text()}`);
  });

  let answerNext = [];
  const sent = [];
  await page.setRequestInterception(true);
  page.on("request", (request) => {
    const target = new URL(request.url());
    if (target.protocol.startsWith("http") && target.origin !== new URL(url).origin) complaints.push(`a request to ${target.origin}`);
    if (target.pathname.endsWith("/v1/chat/completions")) {
      sent.push({ headers: request.headers(), body: JSON.parse(request.postData() ?? "{}") });
      const made = answerNext.shift();
      if (made) return request.respond(made);
    }
    return request.continue();
  });

  await page.goto(url);
  return {
    browser, page, complaints, sent,
    /** The next requests for an answer get these instead of the server's. */
    answerNextWith: (...made) => { answerNext = made; },
  };
}

export const text = (page, selector) => page.$eval(selector, (element) => element.textContent.trim());

export const count = (page, selector) => page.$$eval(selector, (elements) => elements.length);

/** A number of the panel: read, cached, generated. */
export async function figure(page, name) {
  return Number((await text(page, `[data-figure="${name}"]`)).replaceAll(",", ""));
}

export async function drop(page, name, content) {
  await page.evaluate((name, content) => {
    const data = new DataTransfer();
    data.items.add(new File([content], name, { type: "text/plain" }));
    for (const type of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
  }, name, content);
}

export async function ask(page, question) {
  await page.click("#question");
  await page.keyboard.type(question);
  await page.keyboard.press("Enter");
}

/** Waits until no answer is being made; the last one may have failed. */
export async function answered(page, timeout = 300_000) {
  await page.waitForSelector("#send:not([hidden])", { timeout });
  await page.waitForFunction(() => document.querySelector(".answer:last-child")?.getAttribute("aria-busy") === "false", { timeout });
}

/** What a server would stream, for answers that a model can't be made to write. */
export function stream(content) {
  const chunks = [
    { choices: [{ index: 0, delta: { reasoning_content: "First I look at the question." } }] },
    { choices: [{ index: 0, delta: { content } }] },
    { choices: [], timings: { cache_n: 20, prompt_n: 30, prompt_ms: 60, prompt_per_second: 500, predicted_n: 90, predicted_ms: 900, predicted_per_second: 100 } },
  ];
  return { status: 200, contentType: "text/event-stream", body: [...chunks.map((chunk) => JSON.stringify(chunk)), "[DONE]"].map((line) => `data: ${line}\n\n`).join("") };
}

export const failure = (status, message) => ({ status, contentType: "application/json", body: JSON.stringify({ error: { message } }) });
