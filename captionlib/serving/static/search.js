// Answers while one types. Without this script the form does the same when it is sent.
"use strict";

const form = document.getElementById("search");
const results = document.getElementById("results");
let waiting = 0;
let running = null;
let settled = false; // whether one may want to come back to the answer that is shown

async function ask() {
  const asked = new URLSearchParams(new FormData(form));
  for (const name of [...asked.keys()]) if (!asked.get(name)) asked.delete(name);
  const address = asked.size ? `/?${asked}` : "/";
  if (settled && address !== location.pathname + location.search) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
  settled = false;
  remember();
  document.title = asked.get("q") ? `${asked.get("q")} · captionlib` : "captionlib";
  if (running) running.abort();
  const mine = running = new AbortController();
  results.setAttribute("aria-busy", "true");
  try {
    asked.set("fragment", "true");
    const answer = await fetch(`/?${asked}`, { signal: mine.signal });
    const html = await answer.text();
    if (answer.ok) results.innerHTML = html;
  } catch (error) {
    if (error.name !== "AbortError") results.querySelector(".summary").textContent = "The server cannot be reached.";
  } finally {
    if (running === mine) results.setAttribute("aria-busy", "false");
  }
}

function remember() {
  sessionStorage.setItem("search", location.search);
}

if (form) {
  remember();
  window.addEventListener("popstate", () => location.reload());
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(ask, event.target.type === "search" ? 150 : 0);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(waiting);
    ask();
    settled = true;
  });
}

for (const back of document.querySelectorAll(".back a")) back.search = sessionStorage.getItem("search") || "";

const upload = document.querySelector(".upload form");
if (upload) {
  const button = upload.querySelector("button");
  upload.addEventListener("submit", () => { button.textContent = "Looking…"; });
  window.addEventListener("pageshow", () => { button.textContent = "Look"; });
}

document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const box = document.getElementById("q");
    if (!box) return;
    event.preventDefault();
    box.focus();
    box.select();
  }
});
