"use strict";
// What the page does beyond being read. Everything is in the page itself; nothing is fetched.
const report = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const repaints = new Map();

function colour(name) {
  return getComputedStyle(root).getPropertyValue(name).trim();
}

function repaint() {
  for (const again of repaints.values()) again();
}

byId("theme").hidden = false;
byId("theme").addEventListener("click", () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  repaint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
});
