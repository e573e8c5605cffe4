// What a model writes is untrusted: its HTML is shown as text, and what Markdown makes is sanitised.

import { marked } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js";
import { copy, el } from "./dom.js";

const { DOMPurify } = globalThis;

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

marked.use({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escape(text.trim())}</p>` : escape(text)),
    // A picture would be a request to somewhere else, made by a model.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "[x] " : "[ ] "),
  },
});

const PURIFY = {
  ALLOWED_TAGS: "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre strong table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

function withCopyButton(pre) {
  const code = pre.querySelector("code") ?? pre;
  const language = /language-([\w+#.-]+)/.exec(code.className)?.[1] ?? "";
  const button = el("button", { type: "button", class: "quiet", onclick: () => copy(code.textContent, button) }, "Copy");
  const block = el("div", { class: "code" }, el("div", { class: "code-head" }, el("span", {}, language), button));
  pre.tabIndex = 0;  // long lines scroll, by the keyboard, too
  pre.replaceWith(block);
  block.append(pre);
}

/** Puts the Markdown into the element, in place of what was there. */
export function renderMarkdown(element, text) {
  const fragment = DOMPurify.sanitize(marked.parse(text), PURIFY);
  for (const pre of fragment.querySelectorAll("pre")) withCopyButton(pre);
  for (const table of fragment.querySelectorAll("table")) {
    const scroller = el("div", { class: "table", tabindex: "0" });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  element.replaceChildren(fragment);
}
