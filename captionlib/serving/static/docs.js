// Shows the operations of the API with Swagger UI, which is shipped with the server.
"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const setScheme = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", setScheme);
setScheme();

SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#main",
  deepLinking: false, // its links are inside of buttons, which screen readers cannot announce
  defaultModelsExpandDepth: -1,
});

// Corrects what Swagger UI lacks: names of the fields for screen readers, ids that are unique, and examples that scroll
// by keyboard.
new MutationObserver(() => {
  for (const label of document.querySelectorAll("#main label[id]")) label.removeAttribute("id");
  for (const table of document.querySelectorAll("#main table[role=region]")) table.removeAttribute("role");
  for (const field of document.querySelectorAll("[data-param-name] :is(select, input):not([aria-label])")) {
    field.setAttribute("aria-label", field.closest("[data-param-name]").dataset.paramName);
  }
  for (const example of document.querySelectorAll("#main pre:not([tabindex])")) example.tabIndex = 0;
}).observe(document.getElementById("main"), { childList: true, subtree: true });
