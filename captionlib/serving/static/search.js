// Answers while one types. Without this script the form does the same when it is sent.
"use strict";

const form = document.getElementById("search");
const results = document.getElementById("results");
let waiting = 0;
let running = null;

async function ask() {
  const asked = new URLSearchParams(new FormData(form));
  for (const name of [...asked.keys()]) if (!asked.get(name)) asked.delete(name);
  history.replaceState(null, "", asked.size ? `/?${asked}` : "/");
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

if (form) {
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(ask, event.target.type === "search" ? 150 : 0);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(waiting);
    ask();
  });
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
