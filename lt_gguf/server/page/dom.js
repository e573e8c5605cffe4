// Elements, numbers and the few dialogs.

export const $ = (id) => document.getElementById(id);

/** An element; a function among the attributes listens (`onclick`), `true` and `false` set or leave out an attribute. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function icon(path) {
  const image = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  image.setAttribute("viewBox", "0 0 16 16");
  image.setAttribute("aria-hidden", "true");
  image.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  image.firstChild.setAttribute("d", path);
  return image;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const number = (value) => whole.format(value);

export const tokens = (n) => `${number(n)} ${n === 1 ? "token" : "tokens"}`;

export const speed = (perSecond) => `${perSecond < 100 ? perSecond.toFixed(1) : number(perSecond)} tokens/s`;

export function bytes(n) {
  if (n < 1024 * 1024) return `${(n / 1024).toFixed(n < 10 * 1024 ? 1 : 0)} KiB`;
  if (n < 1024 ** 3) return `${(n / 1024 ** 2).toFixed(n < 100 * 1024 ** 2 ? 1 : 0)} MiB`;
  return `${(n / 1024 ** 3).toFixed(2)} GiB`;
}

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}

/** Says something to screen readers that the page shows elsewhere. */
export function announce(text) {
  $("announce").textContent = text;
}

/** The line above the question; without a text it goes. */
export function notice(text, isError = false) {
  const line = $("notice");
  line.textContent = text ?? "";
  line.hidden = !text;
  line.classList.toggle("error", isError);
}

/** Copies, and says so on the button for a moment. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without HTTPS, other than on this computer, browsers have no clipboard but this one.
    const area = el("textarea", { class: "unseen" });
    area.value = text;
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const before = button.textContent;
  if (before === "Copied") return;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}

/** Asks in a dialog: for a text if `value` is one, else for a yes. Gives the text (or true), or null. */
export function ask({ title, text = "", ok, value = null, type = "text" }) {
  const dialog = $("ask");
  const input = $("ask-value");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-text").hidden = !text;
  $("ask-ok").textContent = ok;
  input.hidden = value === null;
  input.type = type;
  input.value = value ?? "";
  return new Promise((resolve) => {
    dialog.returnValue = "";
    $("ask-ok").value = "ok";
    $("ask-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      const given = dialog.returnValue === "ok" ? (value === null ? true : input.value.trim()) : null;
      input.value = "";  // a key shouldn't stay in the page
      resolve(given === "" ? null : given);
    };
    dialog.showModal();
    if (value === null) $("ask-cancel").focus();
    else input.select();
  });
}
