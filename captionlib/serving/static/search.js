// Shows results while typing, and loads further pages while scrolling. Without scripts, the form and the links to the
// pages show the same results.

const form = document.getElementById("search");
const results = document.getElementById("results");
const ITEMS_PER_FRAME = 2;
let timer = 0;
let controller = null;
let submitted = false; // whether the current results keep their entry in the browser's history

function readAddress() {
  const parameters = new URLSearchParams(new FormData(form));
  const defaults = { mode: "text", sort: "relevance" };
  if (parameters.get("q")) parameters.delete("similar_to");
  for (const [name, value] of [...parameters]) if (!value || value === defaults[name]) parameters.delete(name);
  return parameters.size ? `/?${parameters}` : "/";
}

async function fetchFragment(address, signal) {
  const response = await fetch(`${address}${address.includes("?") ? "&" : "?"}fragment=true`, { signal });
  return response.ok ? response.text() : null;
}

async function search() {
  const address = readAddress();
  if (submitted && address !== location.pathname + location.search) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
  submitted = false;
  const query = form.elements.q.value;
  document.title = query ? `${query} · captionlib` : "captionlib";
  controller?.abort();
  const current = (controller = new AbortController());
  results.setAttribute("aria-busy", "true");
  try {
    const html = await fetchFragment(address, current.signal);
    if (html !== null) show(html);
  } catch (error) {
    if (error.name !== "AbortError") results.querySelector(".summary").textContent = "The server cannot be reached.";
  } finally {
    if (controller === current) results.setAttribute("aria-busy", "false");
  }
}

function show(html) {
  const focused = results.contains(document.activeElement) ? document.activeElement.id : "";
  results.innerHTML = html;
  if (focused) document.getElementById(focused)?.focus();
  watchNextPage();
}

const observer = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) loadNextPage();
}, { rootMargin: "1200px" });

function watchNextPage() {
  observer.disconnect();
  const link = results.querySelector("a[rel=next]");
  if (link) observer.observe(link);
}

async function loadNextPage() {
  observer.disconnect();
  const link = results.querySelector("a[rel=next]");
  const address = link.getAttribute("href");
  const html = await fetchFragment(address).catch(() => null);
  if (html === null || !link.isConnected) return;
  history.replaceState(null, "", address); // the page that a reload shows
  const page = new DOMParser().parseFromString(html, "text/html");
  const items = [...page.querySelectorAll(".cards li")];
  while (items.length) { // a few at a time, between frames
    await new Promise((resolve) => (window.requestIdleCallback ?? setTimeout)(resolve));
    if (!link.isConnected) return; // other results are shown by now
    results.querySelector(".cards").append(...items.splice(0, ITEMS_PER_FRAME));
  }
  const next = page.querySelector("a[rel=next]");
  if (next) link.href = next.getAttribute("href");
  else link.remove();
  watchNextPage();
}

if (form && results) {
  window.addEventListener("popstate", () => location.reload());
  if (!form.elements.q.value) form.elements.q.focus({ preventScroll: true });
  const searchSoon = (event) => {
    if (event.target.form !== form) return;
    clearTimeout(timer);
    timer = setTimeout(search, event.target.type === "search" ? 150 : 0);
  };
  document.addEventListener("input", searchSoon);
  document.addEventListener("change", (event) => { // not all programs that control a browser send `input` for a select
    if (event.target.matches("select")) searchSoon(event);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    search();
    submitted = true;
  });
  watchNextPage();
}

const selection = document.getElementById("selection");
if (selection) {
  const update = () => {
    const count = document.querySelectorAll(".select :checked").length;
    selection.querySelector("output").textContent = `${count} selected`;
  };
  document.addEventListener("change", update);
  selection.addEventListener("reset", () => setTimeout(update));
  update();
}
