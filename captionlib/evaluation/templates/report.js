const PAGE_SIZE = 60, EXTREMES = 8;
const items = window.captionlibReport ?? [];
const $ = id => document.getElementById(id);
const controls = ["words", "where", "split", "correctness", "order"].map($);
let matches = [], page = 0;

for (const [position, item] of items.entries()) {
  item.position = position;
  item.text = {
    caption: ` ${item.caption.toLowerCase()}`,
    references: ` ${item.references.join(" ").toLowerCase()}`,
    id: ` ${item.id.toLowerCase()}`,
  };
  item.wrong = Object.entries(item.attributes).filter(([, correct]) => !correct).map(([name]) => name);
}

const has = name => items.some(item => item[name] !== null);
const compareBy = (name, sign) => (a, b) =>
  (a[name] === null) - (b[name] === null) || sign * (a[name] - b[name]) || a.position - b.position;
const orders = { position: compareBy("position", 1) };
function addOption(select, value, label) {
  select.append(Object.assign(document.createElement("option"), { value, textContent: label }));
  select.hidden = false;
}
function addOrder(value, label, name, sign) {
  if (!has(name)) return;
  orders[value] = compareBy(name, sign);
  addOption($("order"), value, label);
}
addOrder("best", "highest CIDEr first", "cider", -1);
addOrder("worst", "lowest CIDEr first", "cider", 1);
addOrder("most-probable", "most probable first", "logProb", -1);
addOrder("least-probable", "least probable first", "logProb", 1);
addOrder("best-fit", "best fit of caption and image first", "imageTextScore", -1);
addOrder("worst-fit", "worst fit of caption and image first", "imageTextScore", 1);
const splits = [...new Set(items.map(item => item.split))].sort();
if (splits.length > 1) for (const split of splits) addOption($("split"), `=${split}`, split || "no split");
const attributes = [...new Set(items.flatMap(item => Object.keys(item.attributes)))];
for (const name of attributes) addOption($("correctness"), `=${name}`, `${name} wrong`);

function createElement(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text; // not parsed as HTML, because captions are untrusted
  return element;
}
function createDetails(listTag, title, texts) {
  const details = createElement("details"), list = createElement(listTag);
  details.append(createElement("summary", "", title), list);
  list.append(...texts.map(text => createElement("li", "", text)));
  return details;
}
function createImage(item) {
  const createPlaceholder = () => createElement("div", "image unreadable", "image not readable");
  if (!item.thumbnail) return createPlaceholder();
  const image = createElement("img", "image");
  Object.assign(image, { loading: "lazy", decoding: "async", width: 224, height: 224, alt: `image ${item.id}` });
  image.addEventListener("error", () => image.replaceWith(createPlaceholder()));
  image.src = item.thumbnail;
  return image;
}
function createAttribute([name, correct]) {
  const entry = createElement("li", correct ? "correct" : "wrong"), sign = createElement("span", "", correct ? "✓ " : "✗ ");
  sign.setAttribute("aria-hidden", "true");
  entry.append(sign, name, createElement("span", "screen-reader", correct ? ": correct" : ": wrong"));
  return entry;
}
function createCard(item) {
  const card = createElement("li"), frame = createElement("div", "frame"), text = createElement("div", "text");
  frame.append(createImage(item));
  const lines = [];
  if (item.cider !== null) lines.push(`CIDEr ${item.cider.toFixed(2)}`);
  if (item.logProb !== null) lines.push(`log-probability ${item.logProb.toFixed(2)}`);
  if (item.imageTextScore !== null) lines.push(`fits the image: ${item.imageTextScore.toFixed(2)}`);
  const hasMaps = item.caption && item.attention.length > 0;
  text.append(hasMaps ? createWordButtons(item, frame) : createElement("p", "caption", item.caption || "(empty caption)"));
  for (const line of [...lines, item.id]) text.append(createElement("p", "meta", line));
  if (Object.keys(item.attributes).length) {
    const list = createElement("ul", "attributes");
    list.append(...Object.entries(item.attributes).map(createAttribute));
    text.append(list);
  }
  if (item.candidates.length > 1) {
    const candidates = item.candidates.map(([caption, logProb]) => `${caption} (${logProb?.toFixed(2) ?? "unknown"})`);
    text.append(createDetails("ol", `${candidates.length} candidates, with log-probabilities`, candidates));
  }
  if (item.references.length) text.append(createDetails("ul", "references", item.references));
  card.append(frame, text);
  return card;
}

function isMatch(item) {
  const [words, where, split, correctness] = controls.map(control => control.value);
  if (split && `=${item.split}` !== split) return false;
  if (correctness === "correct" && item.wrong.length) return false;
  if (correctness === "incorrect" && !item.wrong.length) return false;
  if (correctness.startsWith("=") && !item.wrong.includes(correctness.slice(1))) return false;
  return words.toLowerCase().split(/\s+/).filter(Boolean).every(word => item.text[where].includes(` ${word}`));
}
function updateMatches() {
  matches = items.filter(isMatch).sort(orders[$("order").value]);
  const total = `${items.length} ${items.length === 1 ? "image" : "images"}`;
  $("count").textContent = matches.length === items.length ? total : `${matches.length} of ${total}`;
  showPage(0);
}
function showPage(number) {
  const pages = Math.max(1, Math.ceil(matches.length / PAGE_SIZE));
  page = Math.min(Math.max(number, 0), pages - 1);
  $("cards").replaceChildren(...matches.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE).map(createCard));
  $("page").textContent = `page ${page + 1} of ${pages}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page === pages - 1;
  document.querySelector(".pager").hidden = pages === 1;
}
function showExtremes() {
  const name = has("cider") ? "cider" : "logProb";
  const titles = name === "cider" ? ["best by CIDEr", "worst by CIDEr"] : ["most probable", "least probable"];
  const scored = items.filter(item => item[name] !== null).sort((a, b) => b[name] - a[name]);
  if (scored.length < 2 * EXTREMES) return;
  $("best-title").textContent = `The ${EXTREMES} ${titles[0]}`;
  $("worst-title").textContent = `The ${EXTREMES} ${titles[1]}`;
  $("best").append(...scored.slice(0, EXTREMES).map(createCard));
  $("worst").append(...scored.slice(-EXTREMES).reverse().map(createCard));
  $("extremes").hidden = false;
}

for (const control of controls) control.addEventListener("input", updateMatches);
document.forms[0].addEventListener("submit", event => event.preventDefault());
for (const [id, step] of [["previous", -1], ["next", 1]]) {
  $(id).addEventListener("click", () => {
    showPage(page + step);
    document.forms[0].scrollIntoView();
  });
}
$("missing-data").hidden = Boolean(window.captionlibReport);
showExtremes();
updateMatches(); // browsers may restore the controls after a reload
