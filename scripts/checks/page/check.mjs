// The page of `lt-gguf serve` in a browser, end to end: npm install, then node check.mjs URL FOLDER
// FOLDER gets screenshots. Exit code 1 and one line on stderr if something is wrong.

import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { answered, ask, count, drop, expect, Failed, failure, figure, openPage, stream, text } from "./browser.mjs";

const [url, folder] = process.argv.slice(2);
if (!url || !folder) {
  console.error("usage: node check.mjs URL FOLDER");
  process.exit(2);
}
mkdirSync(folder, { recursive: true });

/** Letters of short words, the same every time; `first` makes one that no state of another one serves. */
function letters(words, first) {
  const names = ["Ann", "Ben", "Eve", "Tom", "Ida", "Max"];
  const short = "the sun is low and the old man has a red hat in his hand so we go to the sea now if it is not too far from our door".split(" ");
  const parts = [first];
  let seed = 7;
  for (let i = 0; i < words; i += 1) {
    seed = (seed * 1103515245 + 12345) % 2 ** 31;
    if (i % 60 === 0) parts.push(`\n\nDear ${names[i / 60 % names.length]}, this is letter ${i / 60 + 1}.`);
    parts.push(short[seed % 65536 % short.length] + (i % 12 === 11 ? "." : ""));
  }
  return parts.join(" ");
}

const session = await openPage(url);
const { page, sent, complaints } = session;
const shot = (name) => page.screenshot({ path: join(folder, `${name}.png`) });
const done = (line) => console.log(`ok  ${line}`);

async function tokensOf(content) {
  return page.evaluate(async (content) => (await (await fetch("lt/document", {
    method: "POST", headers: { "X-Filename": "letters.txt" }, body: content,
  })).json()).n_tokens, content);
}

/** How many tokens of prompts the server has read, as it says itself. */
async function tokensRead() {
  const metrics = await page.evaluate(async () => (await fetch("metrics")).text());
  return Number(/^llamacpp:prompt_tokens_total (\S+)/m.exec(metrics)[1]);
}

async function attach(name, content) {
  await drop(page, name, content);
  await page.waitForSelector("#chips .chip:not([aria-busy])");
  await page.waitForFunction(() => /left/.test(document.querySelector("#fit").textContent));
}

async function setMaxTokens(n) {
  await page.click("#settings-open");
  await page.$eval("#max-tokens", (field, n) => { field.value = n; }, n);
  await page.click("#settings button[type=submit]");
}

/** A name, the export, and that what is typed and not sent survives a reload. */
async function exportAndKeep() {
  await page.click("#session-list .current [title=Rename]");
  await page.waitForSelector("#ask[open]");
  await page.keyboard.type("Routes to the sea");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector("#session-list .current .title").textContent === "Routes to the sea");
  const exported = await page.evaluate(async () => {
    const real = URL.createObjectURL;
    let blob = null;
    URL.createObjectURL = (given) => real(blob = given);
    document.querySelector("#session-export").click();
    URL.createObjectURL = real;
    return blob.text();
  });
  expect(exported.startsWith("# Routes to the sea\n\n## Question\n\nAre you there?\n\n## Answer\n\n"), "the export is something else");
  await page.type("#question", "typed, not sent");
  await new Promise((resolve) => setTimeout(resolve, 1000));
  await page.reload();
  await page.waitForSelector(".answer");
  expect(await page.$eval("#question", (field) => field.value) === "typed, not sent", "what was typed is lost on a reload");
  expect(await text(page, "#session-list .current .title") === "Routes to the sea", "the name is lost on a reload");
  await page.$eval("#question", (field) => field.select());
  await page.keyboard.press("Backspace");
  done("renamed, exported, and what was typed survives a reload");
}

/** The button, and files that are pasted; × takes them away. */
async function otherWaysToAttach() {
  const [chooser] = await Promise.all([page.waitForFileChooser(), page.click("#attach")]);
  await chooser.accept([fileURLToPath(new URL("package.json", import.meta.url))]);
  await page.waitForFunction(() => /package.json/.test(document.querySelector("#chips").textContent) || !document.querySelector("#notice").hidden);
  expect(await count(page, "#notice:not([hidden])") === 0, `the file isn't taken: ${await text(page, "#notice")}`);
  await page.evaluate(() => {
    const data = new DataTransfer();
    data.items.add(new File(["A pasted text."], "pasted.md"));
    document.querySelector("#question").dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
  });
  await page.waitForFunction(() => document.querySelectorAll("#chips .chip:not([aria-busy])").length === 2);
  for (let left = 1; left >= 0; left -= 1) {
    await page.click("#chips .chip button");
    expect(await count(page, "#chips .chip") === left, "a document isn't taken away");
  }
  done("documents by the button and from the clipboard");
}

async function check() {
  const info = await page.evaluate(async () => (await fetch("lt/info")).json());
  await page.waitForFunction((model) => document.querySelector("#model").textContent === model, {}, info.model);
  expect(await count(page, "#strip .cell") === info.n_layer, `the strip doesn't have ${info.n_layer} layers`);
  await shot("empty");
  done(`${info.model}: ${info.n_layer} layers, context ${info.n_ctx}`);

  // As long as 3,000 tokens, or as the context allows beside a few answers.
  const wanted = Math.min(3000, Math.floor(info.n_ctx * 0.7));
  const words = Math.floor(1200 * wanted / await tokensOf(letters(1200, "To my friends.")));
  await setMaxTokens(120);
  await attach("letters.txt", letters(words, "To my friends."));
  const size = Number((await text(page, "#chips .chip .muted")).replace(/\D/g, ""));
  done(`letters.txt attached: ${await text(page, "#fit")}`);
  await page.waitForFunction(() => /^(is read: \d+ %|read)$/.test(document.querySelector("#ahead").textContent));
  await shot("attached");
  await page.waitForFunction(() => document.querySelector("#ahead").textContent === "read", { timeout: 300_000 });
  const before = await tokensRead();

  await ask(page, "Who has a red hat?");
  await answered(page);
  expect(await tokensRead() - before < size / 4, `the document, read while the question was typed, was read again: ${await tokensRead() - before} tokens`);
  expect(await count(page, ".answer .error") === 0, `the first answer failed: ${await text(page, ".answer").catch(() => "")}`);
  expect((await text(page, ".answer > .markdown")).length > 0, "the first answer is empty");
  expect(await figure(page, "read") + await figure(page, "cached") >= size, "the first answer was given without the document");
  expect(await count(page, ".question .chip") === 1, "the question doesn't show its document");
  done(`answered: read ${await figure(page, "read")}, reused ${await figure(page, "cached")}, generated ${await figure(page, "generated")}`);
  await shot("answered");

  await page.click(".question .actions button");
  await page.$eval(".question textarea", (field) => field.select());
  await page.keyboard.type("Where do they go now?");
  await page.keyboard.press("Enter");
  await answered(page);
  const [read, cached] = [await figure(page, "read"), await figure(page, "cached")];
  done(`edited question: read ${read}, reused ${cached}`);
  expect(await text(page, ".question-text") === "Where do they go now?", "the edited question isn't shown");
  expect(sent.at(-1).body.messages.at(-1).content.endsWith("\n\nEnd of the document letters.txt.\n\nWhere do they go now?"), "the document doesn't stand before the question");
  // What follows doesn't hang on it, so the check goes on.
  if (read >= size / 4 || cached <= size / 2) complaints.push(`the edited question read ${read} tokens; the document has ${size} and should have been reused`);

  await ask(page, "And then?");
  await answered(page);
  done(`next question: read ${await figure(page, "read")}, reused ${await figure(page, "cached")}`);
  await page.hover("#strip .cell.streams, #strip .cell");
  expect(/^layer \d+: (streaming|full), holds /.test(await text(page, "#layer-readout")), "the strip doesn't say what a layer holds");
  await shot("light");
  await page.click("#theme-toggle");
  await shot("dark");
  await page.reload();
  await page.waitForFunction(() => document.querySelectorAll(".answer").length === 2);
  expect(await page.$eval("html", (root) => root.dataset.theme) === "dark", "the colours aren't remembered");
  expect(await text(page, ".question-text") === "Where do they go now?", "the conversation is another one after a reload");
  await page.click("#theme-toggle");
  done("the conversation and the colours survive a reload");

  await drop(page, "large.txt", letters(words * 4 * Math.ceil(info.n_ctx / wanted), "Too large."));
  await page.waitForFunction(() => /doesn't fit/.test(document.querySelector("#notice").textContent));
  expect(await count(page, "#chips .chip") === 0, "a document that doesn't fit stays attached");
  done(`refused: ${await text(page, "#notice")}`);

  await page.click("#session-new");
  await attach("others.txt", letters(words, "To others."));
  await ask(page, "Who writes?");
  await page.waitForSelector("progress[value]");
  await new Promise((resolve) => setTimeout(resolve, 500));  // the bar moves softly
  await shot("reading");
  await page.keyboard.press("Escape");
  await answered(page, 20_000);
  expect(await text(page, ".answer .note") === "Stopped.", "Esc doesn't stop the answer");
  done("stopped while reading");

  await page.click("#session-new");
  session.answerNextWith(failure(401, "Invalid API Key"));
  await ask(page, "Are you there?");
  await page.waitForSelector("#ask[open]");
  await page.type("#ask-value", "a-key");
  await page.keyboard.press("Enter");
  await answered(page);
  expect(sent.at(-1).headers.authorization === "Bearer a-key", "the request isn't repeated with the key");
  done("the key is asked for");

  session.answerNextWith(failure(503, "The server is being restarted."));
  await ask(page, "Still there?");
  await answered(page);
  expect(/being restarted/.test(await text(page, ".answer:last-child .error")), "the server's error isn't shown");
  await shot("error");
  await page.click(".answer:last-child .error button");
  await answered(page);
  expect(await count(page, ".error.line") === 0 && /Still there/.test(await text(page, "#messages")), "the retry failed");
  done("an error is a line, and is retried");

  session.answerNextWith(stream([
    "## Routes", "Both go **to the sea**; see [the map](https://example.org/map) and [this](javascript:alert(1)).",
    "<img src=x onerror=\"window.attacked = true\"><script>window.attacked = true</script> ![seen](https://example.org/seen.png)",
    "| route | hours |\n| --- | --: |\n| road | 2.5 |\n| path | 4 |", "```python\nfor route in routes:\n    print(route, \"takes\", hours[route])\n```", "1. one\n2. two",
  ].join("\n\n")));
  await ask(page, "Which routes are there?");
  await answered(page);
  const last = ".answer:last-child";
  expect(await page.evaluate(() => window.attacked === undefined), "HTML of an answer is run");
  expect(await count(page, `${last} .markdown img, ${last} .markdown script, ${last} a[href^="javascript"]`) === 0, "an answer isn't sanitised");
  expect(await page.$eval(`${last} a[href]`, (a) => a.target === "_blank" && a.rel.includes("noopener")), "links don't open in a tab of their own");
  expect(await count(page, `${last} .code button`) === 1 && await count(page, `${last} td`) === 4, "Markdown isn't shown as such");
  expect(await page.$eval(`${last} .reasoning`, (details) => !details.hidden && !details.open), "the reasoning isn't folded");
  await shot("markdown");
  done("an answer's Markdown is shown, its HTML isn't run");

  await exportAndKeep();
  await otherWaysToAttach();

  await page.setViewport({ width: 360, height: 740 });
  expect(await page.evaluate(() => document.documentElement.scrollWidth <= 360), "the page is wider than 360 pixels");
  await shot("narrow");
  await page.click("#panel-toggle");
  await shot("narrow-cache");
  await page.keyboard.press("Escape");
  await page.click("#sessions-toggle");
  await shot("narrow-conversations");
  expect(await count(page, "#session-list li") === 3, "the list doesn't have the three conversations");
  done("360 pixels wide");
  expect(complaints.length === 0, complaints[0]);
}

try {
  await check();
} catch (error) {
  await shot("failed").catch(() => {});
  console.error(error instanceof Failed ? error.message : `${error.message} (${error.stack.split("\n").find((line) => line.includes("check.mjs"))?.trim()})`);
  process.exitCode = 1;
} finally {
  await session.browser.close();
}
