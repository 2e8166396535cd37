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
