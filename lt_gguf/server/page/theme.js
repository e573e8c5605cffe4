// Not a module: it runs before the page is painted, so that it never flashes in the other colours.
"use strict";

(() => {
  const KEY = "lt-gguf.theme";
  const root = document.documentElement;
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches;

  function show() {
    const button = document.getElementById("theme-toggle");
    if (!button) return;
    const other = isDark() ? "Light" : "Dark";
    document.getElementById("theme-name").textContent = other;
    button.setAttribute("aria-label", `${other} colours`);
  }

  function toggle() {
    const wanted = isDark() ? "light" : "dark";
    // What the system says anyway isn't remembered: the page then follows the system again.
    if ((wanted === "dark") === systemIsDark.matches) {
      delete root.dataset.theme;
      localStorage.removeItem(KEY);
    } else {
      root.dataset.theme = wanted;
      localStorage.setItem(KEY, wanted);
    }
    show();
  }

  const remembered = localStorage.getItem(KEY);
  if (remembered === "light" || remembered === "dark") root.dataset.theme = remembered;
  systemIsDark.addEventListener("change", show);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme-toggle").addEventListener("click", toggle);
    show();
  });
})();
