// Searches by an image that is chosen, dropped or pasted anywhere on the page.

const form = document.getElementById("upload");

function submit(files) {
  const file = [...files].find((each) => each.type.startsWith("image/")) ?? files[0];
  if (!file) return;
  const transfer = new DataTransfer();
  transfer.items.add(file);
  form.elements.image.files = transfer.files;
  form.requestSubmit();
}

if (form) {
  const button = form.querySelector("button");
  const setDropping = (isDropping) => document.body.classList.toggle("dropping", isDropping);
  form.addEventListener("submit", () => { button.textContent = "Searching…"; });
  form.elements.image.addEventListener("change", () => form.requestSubmit());
  window.addEventListener("pageshow", () => { button.textContent = "Search"; });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return; // text, for the search box
    event.preventDefault();
    submit(event.clipboardData.files);
  });
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    setDropping(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) setDropping(false);
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    setDropping(false);
    submit(event.dataTransfer.files);
  });
}
