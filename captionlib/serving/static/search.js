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

// The server rejects thumbnails while it is busy. A thumbnail of an image that cannot be read is a placeholder instead.
const BUSY = [429, 503];
const MAX_TRIES = 6;
const retried = new WeakSet();

async function retry(image) {
  if (retried.has(image)) return;
  retried.add(image);
  let seconds = 1;
  for (let tries = 0; tries < MAX_TRIES && image.isConnected; tries++) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds * (1 + Math.random() / 2)));
    const response = await fetch(image.src, { headers: { Accept: "image/*" } }).catch(() => null);
    if (response?.ok) {
      image.src = image.src; // the browser has stored the response
      return;
    }
    if (response && !BUSY.includes(response.status)) return;
    seconds = Math.max(2 * seconds, Number(response?.headers.get("Retry-After")) || 0);
  }
}

function isBroken(image) {
  return image.complete && !image.naturalWidth && image.getAttribute("src").startsWith("/thumbnail/");
}

document.addEventListener("error", (event) => {
  if (event.target.tagName === "IMG" && isBroken(event.target)) retry(event.target);
}, true);
for (const image of document.images) if (isBroken(image)) retry(image);

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
