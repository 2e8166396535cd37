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

// The index may not know the size of an image, which the grid needs.
function setRatio(image) {
  const item = image.closest(".cards li");
  if (!item || item.className || !image.naturalWidth) return;
  const ratio = Math.min(2.5, Math.max(0.5, image.naturalWidth / image.naturalHeight));
  item.classList.add(`r${5 * Math.round(20 * ratio)}`);
}

document.addEventListener("load", (event) => {
  if (event.target.tagName === "IMG") setRatio(event.target);
}, true);
for (const image of document.images) if (image.complete) setRatio(image);
