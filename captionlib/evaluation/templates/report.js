const PAGE = 60, EXTREMES = 8;
const items = window.captionlibReport ?? [];
const $ = id => document.getElementById(id);
const controls = ["words", "where", "split", "which", "order"].map($);
let shown = [], page = 0;

for (const [place, item] of items.entries()) {
  item.place = place;
  item.text = {
    caption: ` ${item.caption.toLowerCase()}`,
    references: ` ${item.references.join(" ").toLowerCase()}`,
    id: ` ${item.id.toLowerCase()}`,
  };
  item.wrong = Object.entries(item.marks).filter(([, right]) => !right).map(([name]) => name);
}

const has = name => items.some(item => item[name] !== null);
const by = (name, sign) => (a, b) =>
  (a[name] === null) - (b[name] === null) || sign * (a[name] - b[name]) || a.place - b.place;
const orders = { place: by("place", 1) };
function offer(select, value, label) {
  select.append(Object.assign(document.createElement("option"), { value, textContent: label }));
  select.hidden = false;
}
function offerOrder(value, label, name, sign) {
  if (!has(name)) return;
  orders[value] = by(name, sign);
  offer($("order"), value, label);
}
offerOrder("best", "highest CIDEr first", "cider", -1);
offerOrder("worst", "lowest CIDEr first", "cider", 1);
offerOrder("likely", "most likely first", "logProb", -1);
offerOrder("unlikely", "least likely first", "logProb", 1);
const splits = [...new Set(items.map(item => item.split))].sort();
if (splits.length > 1) for (const split of splits) offer($("split"), `=${split}`, split || "no split");
const marks = [...new Set(items.flatMap(item => Object.keys(item.marks)))];
for (const name of marks) offer($("which"), `=${name}`, `wrong in ${name}`);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never as HTML: captions are anyone's text
  return made;
}
const percent = logProb => `${Number((100 * Math.exp(logProb)).toPrecision(2))}%`;
function list(tag, title, texts) {
  const details = element("details"), entries = element(tag);
  details.append(element("summary", "", title), entries);
  entries.append(...texts.map(text => element("li", "", text)));
  return details;
}
function picture(item) {
  const gone = () => element("div", "picture gone", "the picture cannot be read");
  if (!item.thumbnail) return gone();
  const image = element("img", "picture");
  Object.assign(image, { loading: "lazy", decoding: "async", width: 224, height: 224, alt: `picture ${item.id}` });
  image.addEventListener("error", () => image.replaceWith(gone()));
  image.src = item.thumbnail;
  return image;
}
function mark([name, right]) {
  const entry = element("li", right ? "good" : "bad"), sign = element("span", "", right ? "✓ " : "✗ ");
  sign.setAttribute("aria-hidden", "true");
  entry.append(sign, name, element("span", "spoken", right ? ": right" : ": wrong"));
  return entry;
}
function card(item) {
  const made = element("li"), frame = element("div", "frame"), text = element("div", "text");
  frame.append(picture(item));
  const meta = [];
  if (item.cider !== null) meta.push(`CIDEr ${item.cider.toFixed(2)}`);
  if (item.logProb !== null) meta.push(`log-probability ${item.logProb.toFixed(2)} (${percent(item.logProb)})`);
  const words = item.caption && item.looks.length > 0;
  text.append(words ? lookAt(item, frame) : element("p", "caption", item.caption || "(nothing)"));
  for (const line of [...meta, item.id]) text.append(element("p", "meta", line));
  if (Object.keys(item.marks).length) {
    const all = element("ul", "marks");
    all.append(...Object.entries(item.marks).map(mark));
    text.append(all);
  }
  if (item.candidates.length > 1) {
    const texts = item.candidates.map(([caption, logProb]) => `${caption} (${percent(logProb)})`);
    text.append(list("ol", `the ${texts.length} most likely`, texts));
  }
  if (item.references.length) text.append(list("ul", "what people say", item.references));
  made.append(frame, text);
  return made;
}

function wanted(item) {
  const [words, where, split, which] = controls.map(control => control.value);
  if (split && `=${item.split}` !== split) return false;
  if (which === "right" && item.wrong.length) return false;
  if (which === "wrong" && !item.wrong.length) return false;
  if (which.startsWith("=") && !item.wrong.includes(which.slice(1))) return false;
  return words.toLowerCase().split(/\s+/).filter(Boolean).every(word => item.text[where].includes(` ${word}`));
}
function select() {
  shown = items.filter(wanted).sort(orders[$("order").value]);
  $("count").textContent =
    shown.length === items.length ? `${items.length} pictures` : `${shown.length} of ${items.length} pictures`;
  turn(0);
}
function turn(to) {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  page = Math.min(Math.max(to, 0), pages - 1);
  $("cards").replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(card));
  $("page").textContent = `page ${page + 1} of ${pages}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page === pages - 1;
  document.querySelector(".pager").hidden = pages === 1;
}
function showExtremes() {
  const name = has("cider") ? "cider" : "logProb";
  const titles = name === "cider" ? ["best by CIDEr", "worst by CIDEr"] : ["most likely", "least likely"];
  const scored = items.filter(item => item[name] !== null).sort((a, b) => b[name] - a[name]);
  if (scored.length < 2 * EXTREMES) return;
  $("best-title").textContent = `The ${EXTREMES} ${titles[0]}`;
  $("worst-title").textContent = `The ${EXTREMES} ${titles[1]}`;
  $("best").append(...scored.slice(0, EXTREMES).map(card));
  $("worst").append(...scored.slice(-EXTREMES).reverse().map(card));
  $("extremes").hidden = false;
}

for (const control of controls) control.addEventListener("input", select);
document.forms[0].addEventListener("submit", event => event.preventDefault());
for (const [id, step] of [["previous", -1], ["next", 1]]) {
  $(id).addEventListener("click", () => {
    turn(page + step);
    document.forms[0].scrollIntoView();
  });
}
$("lost").hidden = Boolean(window.captionlibReport);
showExtremes();
select(); // browsers may keep what was chosen before a reload
