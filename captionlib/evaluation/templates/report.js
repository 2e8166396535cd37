const PAGE_SIZE = 60, EXTREMES = 10;
const items = window.captionlibReport ?? [];
const $ = id => document.getElementById(id);
const controls = ["words", "where", "split", "correctness", "winner", "order"].map($);
let matches = [], page = 0;

for (const [position, item] of items.entries()) {
  item.position = position;
  item.gain = item.baseline?.gain ?? null;
  item.text = {
    caption: ` ${item.caption.toLowerCase()} ${item.baseline?.caption.toLowerCase() ?? ""}`,
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
addOrder("gain", "A better than B first", "gain", -1);
addOrder("loss", "B better than A first", "gain", 1);
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

if (items.some(item => item.baseline)) $("winner").hidden = false;
if (has("gain")) for (const [value, label] of [["a", "A is better"], ["b", "B is better"]]) addOption($("winner"), value, label);

function listWords() {
  return $("words").value.toLowerCase().split(/\s+/).filter(Boolean);
}
// Appends a text in which the words that are searched for are marked.
function appendMarked(element, text, where) {
  const words = $("where").value === where ? listWords() : [];
  const isMatch = part => words.some(word => part.toLowerCase().startsWith(word));
  for (const part of text.split(/(\s+)/)) element.append(isMatch(part) ? createElement("mark", "", part) : part);
  return element;
}
function createDetails(listTag, name, texts) {
  const details = createElement("details"), list = createElement(listTag);
  details.append(createElement("summary", "", `${texts.length} ${texts.length === 1 ? name.slice(0, -1) : name}`), list);
  list.append(...texts.map(text => appendMarked(createElement("li"), text, name)));
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
// Returns the captions of both runs. The words that only one of them contains are underlined.
function createRuns(item) {
  const runs = [["a", item, item.baseline], ["b", item.baseline, item]];
  return runs.map(([name, run, other]) => {
    const isWinner = item.gain !== null && (name === "a" ? item.gain : -item.gain) > 0;
    const line = createElement("p", `run ${name}${isWinner ? " winner" : ""}`), said = createElement("span", "said");
    const otherWords = new Set(other.caption.toLowerCase().split(/\s+/));
    for (const part of (run.caption || "(empty caption)").split(/(\s+)/)) {
      const differs = part.trim() && !otherWords.has(part.toLowerCase());
      said.append(appendMarked(createElement("span", differs ? "differs" : ""), part, "caption"));
    }
    if (run.cider !== null) said.append(" ", createElement("span", "score", run.cider.toFixed(2)));
    line.append(createElement("span", `badge ${name}`, name.toUpperCase()), said);
    return line;
  });
}
function formatNumber(number) {
  return number.toFixed(2).replace("-", "−");
}
function createGain(gain) {
  const sign = gain > 0 ? "+" : gain < 0 ? "−" : "", label = createElement("span", `gain ${gain > 0 ? "better" : gain < 0 ? "worse" : ""}`);
  label.append(createElement("span", "screen-reader", "CIDEr of A minus B: "), `${sign}${Math.abs(gain).toFixed(2)}`);
  return label;
}
// The attention maps of an image are in a script of their own, which is loaded when its card is near the screen. A page
// opened from disk cannot load other kinds of files.
const mapCards = new Map(), loading = new Map();
const nearScreen = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) showMaps(target);
}, { rootMargin: "300px" });
async function showMaps(card) {
  const item = mapCards.get(card);
  nearScreen.unobserve(card);
  mapCards.delete(card);
  const maps = await loadMaps(item).catch(() => null);
  if (!maps) return;
  const caption = card.querySelector(".caption"), marked = new Set([...caption.querySelectorAll("mark")].map(mark => mark.textContent));
  const buttons = createWordButtons({ caption: item.caption, attention: maps }, card.querySelector(".frame"));
  for (const word of buttons.querySelectorAll(".word")) if (marked.has(word.textContent)) word.replaceChildren(createElement("mark", "", word.textContent));
  caption.replaceWith(buttons);
}
function loadMaps(item) {
  item.maps ??= new Promise((resolve, reject) => {
    const script = Object.assign(document.createElement("script"), { src: item.attention, onerror: reject });
    script.onload = () => script.remove();
    loading.set(item.position, resolve);
    document.head.append(script);
  });
  return item.maps;
}
window.captionlibMaps = (position, maps) => loading.get(position)(maps);

function createCard(item) {
  const card = createElement("li"), frame = createElement("div", "frame"), text = createElement("div", "text");
  frame.append(createImage(item));
  const lines = [];
  if (item.cider !== null && !item.baseline) lines.push(`CIDEr ${item.cider.toFixed(2)}`);
  if (item.gain !== null) frame.append(createGain(item.gain));
  if (item.logProb !== null && !item.baseline) lines.push(`log-probability\u00a0${formatNumber(item.logProb)}`);
  if (item.imageTextScore !== null) lines.push(`fits the image: ${item.imageTextScore.toFixed(2)}`);
  if (item.baseline) text.append(...createRuns(item));
  else text.append(appendMarked(createElement("p", "caption"), item.caption || "(empty caption)", "caption"));
  if (item.attention && item.caption && !item.baseline) {
    mapCards.set(card, item);
    nearScreen.observe(card);
  }
  for (const line of [lines.join(" · "), item.id].filter(Boolean)) text.append(createElement("p", "meta", line));
  if (Object.keys(item.attributes).length) {
    const list = createElement("ul", "attributes");
    list.append(...Object.entries(item.attributes).map(createAttribute));
    text.append(list);
  }
  if (item.candidates.length > 1) {
    const candidates = item.candidates.map(([caption, logProb]) => logProb === null ? caption : `${caption} (log-probability ${formatNumber(logProb)})`);
    text.append(createDetails("ol", "candidates", candidates));
  }
  if (item.references.length) text.append(createDetails("ul", "references", item.references));
  card.append(frame, text);
  return card;
}

function isMatch(item) {
  const [, where, split, correctness, winner] = controls.map(control => control.value);
  if (split && `=${item.split}` !== split) return false;
  if (correctness === "correct" && item.wrong.length) return false;
  if (correctness === "incorrect" && !item.wrong.length) return false;
  if (correctness.startsWith("=") && !item.wrong.includes(correctness.slice(1))) return false;
  if (winner && !isWinner(item, winner)) return false;
  return listWords().every(word => item.text[where].includes(` ${word}`));
}
function isWinner(item, winner) {
  const isSame = item.caption === item.baseline.caption;
  return { same: isSame, different: !isSame, a: item.gain > 0, b: item.gain !== null && item.gain < 0 }[winner];
}
function updateMatches() {
  matches = items.filter(isMatch).sort(orders[$("order").value]);
  const total = `${items.length} ${items.length === 1 ? "image" : "images"}`;
  $("count").textContent = matches.length === items.length ? total : `${matches.length} of ${total}`;
  $("no-match").hidden = matches.length > 0 || !items.length;
  showPage(0);
  saveState();
}
// Keeps the filter and the order in the address, so that a link or a reload shows the same images.
function saveState() {
  const changed = controls.filter(control => control.value !== defaults.get(control)).map(control => [control.id, control.value]);
  history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
}
function restoreState() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const control of controls) {
    control.value = state.get(control.id) ?? defaults.get(control);
    if (control.selectedIndex === -1) control.value = defaults.get(control); // the option does not exist
  }
  updateMatches();
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
function showStrip(id, title, shown) {
  if (!shown.length) return;
  $(`${id}-title`).textContent = title;
  $(id).append(...shown.map(createCard));
  $(`${id}-section`).hidden = false;
}
function showExtremes() {
  if (has("gain")) {
    const sorted = items.filter(item => item.gain).sort((a, b) => b.gain - a.gain);
    showStrip("best", "A is better than B", sorted.filter(item => item.gain > 0).slice(0, EXTREMES));
    showStrip("worst", "B is better than A", sorted.filter(item => item.gain < 0).slice(-EXTREMES).reverse());
    return;
  }
  const name = has("cider") ? "cider" : "logProb";
  const titles = name === "cider" ? ["best by CIDEr", "worst by CIDEr"] : ["most probable", "least probable"];
  const scored = items.filter(item => item[name] !== null).sort((a, b) => b[name] - a[name]);
  if (scored.length < 2 * EXTREMES) return;
  showStrip("best", `The ${EXTREMES} ${titles[0]}`, scored.slice(0, EXTREMES));
  showStrip("worst", `The ${EXTREMES} ${titles[1]}`, scored.slice(-EXTREMES).reverse());
}

const defaults = new Map(controls.map(control => [control, control.id === "words" ? "" : control.options[0].value]));
for (const control of controls) control.addEventListener("input", updateMatches);
document.forms[0].addEventListener("submit", event => event.preventDefault());
for (const [id, step] of [["previous", -1], ["next", 1]]) {
  $(id).addEventListener("click", () => {
    showPage(page + step);
    document.forms[0].scrollIntoView();
  });
}
for (const button of document.querySelectorAll("[data-strip]")) {
  const strip = $(button.dataset.strip);
  button.addEventListener("click", () => strip.scrollBy({ left: button.dataset.step * strip.clientWidth, behavior: "smooth" }));
}
$("clear").addEventListener("click", () => {
  for (const control of controls) if (control.id !== "order") control.value = defaults.get(control);
  updateMatches();
  $("words").focus();
});
window.addEventListener("hashchange", restoreState);
$("missing-data").hidden = Boolean(window.captionlibReport);
showExtremes();
restoreState();
