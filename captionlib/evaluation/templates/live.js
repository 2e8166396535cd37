"use strict";
// Requests the page again every few seconds, and replaces the sections that have changed.
const SECONDS = 5;
const connection = document.getElementById("connection");
const shown = new Map();

function listSections(page) {
  return page.querySelectorAll("[data-live]");
}
function replaceSection(section) {
  if (section.isEqualNode(shown.get(section.id) ?? null)) return;
  shown.set(section.id, section.cloneNode(true));
  const current = document.getElementById(section.id);
  for (const details of current?.querySelectorAll("details") ?? []) {
    const same = section.querySelector(`#${CSS.escape(details.id)}`);
    if (same) same.open = details.open;
  }
  const focused = current?.contains(document.activeElement) && document.activeElement.closest("details")?.id;
  if (current) current.replaceWith(section);
  else document.getElementById("failures").before(section); // the speed, which is unknown at first
  if (focused) document.querySelector(`#${CSS.escape(focused)} summary`)?.focus();
}
async function update() {
  try {
    const response = await fetch("/", { cache: "no-store" });
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    if (!response.ok) throw new Error(page.querySelector("main")?.textContent.trim() ?? response.statusText);
    document.title = page.title;
    for (const section of listSections(page)) replaceSection(section);
    connection.hidden = true;
  } catch (error) {
    connection.textContent = `This page is not up to date. ${error instanceof TypeError ? "The server cannot be reached." : error.message}`;
    connection.hidden = false;
  }
  setTimeout(update, SECONDS * 1000);
}
for (const section of listSections(document)) shown.set(section.id, section.cloneNode(true));
setTimeout(update, SECONDS * 1000);
