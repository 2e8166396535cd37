// Shows results while typing. Without scripts, submitting the form shows the same results.
"use strict";

const form = document.getElementById("search");
const results = document.getElementById("results");
let timer = 0;
let controller = null;
let submitted = false; // whether the current results keep their entry in the browser's history

async function search() {
  const parameters = new URLSearchParams(new FormData(form));
  for (const name of [...parameters.keys()]) if (!parameters.get(name)) parameters.delete(name);
  const url = parameters.size ? `/?${parameters}` : "/";
  if (submitted && url !== location.pathname + location.search) history.pushState(null, "", url);
  else history.replaceState(null, "", url);
  submitted = false;
  storeSearch();
  document.title = parameters.get("q") ? `${parameters.get("q")} · captionlib` : "captionlib";
  if (controller) controller.abort();
  const current = controller = new AbortController();
  results.setAttribute("aria-busy", "true");
  try {
    parameters.set("fragment", "true");
    const response = await fetch(`/?${parameters}`, { signal: current.signal });
    const html = await response.text();
    if (response.ok) results.innerHTML = html;
  } catch (error) {
    if (error.name !== "AbortError") results.querySelector(".summary").textContent = "The server cannot be reached.";
  } finally {
    if (controller === current) results.setAttribute("aria-busy", "false");
  }
}

function storeSearch() {
  sessionStorage.setItem("search", location.search);
}

if (form) {
  storeSearch();
  window.addEventListener("popstate", () => location.reload());
  form.addEventListener("input", (event) => {
    clearTimeout(timer);
    timer = setTimeout(search, event.target.type === "search" ? 150 : 0);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    search();
    submitted = true;
  });
}

for (const link of document.querySelectorAll(".back a")) link.search = sessionStorage.getItem("search") || "";

const upload = document.querySelector(".upload form");
if (upload) {
  const button = upload.querySelector("button");
  upload.addEventListener("submit", () => { button.textContent = "Searching…"; });
  window.addEventListener("pageshow", () => { button.textContent = "Search"; });
}

document.addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const input = document.getElementById("q");
    if (!input) return;
    event.preventDefault();
    input.focus();
    input.select();
  }
});
