// Attention maps: each word of a caption is a button that overlays its map on the image.
function createElement(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text; // not parsed as HTML, because captions are untrusted
  return element;
}

const SIDE = 112; // side of the smoothed map in pixels

// Upsamples each row to SIDE values with cubic B-splines, which are smooth and non-negative, and transposes the result.
function upsample(values, rows) {
  const side = values.length / rows, result = new Float32Array(SIDE * rows);
  for (let x = 0; x < SIDE; x++) {
    const center = ((x + 0.5) * side) / SIDE - 0.5, first = Math.floor(center) - 1, t = center - first - 1;
    const weights = [(1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, 3 * (t + t ** 2 - t ** 3) + 1, t ** 3];
    const columns = weights.map((_, k) => Math.min(Math.max(first + k, 0), side - 1));
    for (let row = 0; row < rows; row++)
      result[x * rows + row] = weights.reduce((sum, weight, k) => sum + (weight * values[row * side + columns[k]]) / 6, 0);
  }
  return result;
}

// Maps attention from 0 to 1 to RGBA: transparent, then red, orange and yellow.
function toColor(attention) {
  const mix = (from, to, fraction) => from + (to - from) * Math.min(Math.max(fraction, 0), 1);
  return [mix(200, 255, 2 * attention), mix(20, 240, 1.6 * attention - 0.5), mix(60, 90, 2 * attention - 1), 185 * attention ** 1.1];
}
function drawMap(canvas, values) {
  const smoothed = upsample(upsample(values, Math.sqrt(values.length)), SIDE), peak = Math.max(...smoothed);
  const pixels = new ImageData(SIDE, SIDE);
  smoothed.forEach((value, index) => pixels.data.set(toColor(value / peak), 4 * index));
  canvas.width = canvas.height = SIDE;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// Describes a map for screen readers by the cell of a 3 x 3 grid with the highest mean attention, if it stands out.
function describeMap(values) {
  const side = Math.sqrt(values.length), toThird = index => Math.floor((3 * (index + 0.5)) / side);
  const sums = new Float32Array(9), counts = new Float32Array(9);
  values.forEach((value, index) => {
    const zone = 3 * toThird(Math.floor(index / side)) + toThird(index % side);
    sums[zone] += value;
    counts[zone]++;
  });
  const means = sums.map((sum, zone) => sum / (counts[zone] || 1)), highest = Math.max(...means);
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  if (highest < 1.5 * mean) return "attention on the whole image";
  const zone = means.indexOf(highest);
  const names = [["top", "", "bottom"][Math.floor(zone / 3)], ["left", "", "right"][zone % 3]];
  return `attention on the ${names.filter(Boolean).join(" ") || "center"}`;
}

// Returns the caption as a toolbar of buttons: Tab reaches one of them, and arrow keys move to the others.
function createWordButtons(item, frame) {
  const toolbar = createElement("p", "caption"), canvas = createElement("canvas", "attention");
  canvas.setAttribute("aria-hidden", "true");
  toolbar.setAttribute("role", "toolbar");
  toolbar.setAttribute("aria-label", "caption: choose a word to see its attention map");
  const maps = item.attention.map(text => Uint8Array.from(atob(text), char => char.charCodeAt(0)));
  const words = item.caption.split(" ").filter(Boolean);
  const buttons = maps.map((values, index) => {
    const isEnd = index >= words.length, button = createElement("button", "word", isEnd ? "." : words[index]);
    Object.assign(button, { type: "button", tabIndex: index ? -1 : 0, ariaPressed: "false" });
    button.setAttribute("aria-label", `${isEnd ? "end" : words[index]}: ${describeMap(values)}`);
    return button;
  });
  let pinned = null;
  function show(word) {
    for (const button of buttons) button.classList.toggle("active", button === word);
    frame.classList.toggle("highlighted", word !== null);
    if (word) drawMap(canvas, maps[buttons.indexOf(word)]);
  }
  function pin(word) {
    pinned = word;
    for (const button of buttons) button.ariaPressed = String(button === word);
    show(word);
  }
  const findWord = event => event.target.closest(".word");
  toolbar.addEventListener("pointerover", event => event.pointerType === "mouse" && findWord(event) && show(findWord(event)));
  toolbar.addEventListener("pointerleave", () => show(pinned));
  toolbar.addEventListener("focusin", event => {
    for (const button of buttons) button.tabIndex = button === event.target ? 0 : -1;
    if (event.target.matches(":focus-visible")) show(event.target);
  });
  toolbar.addEventListener("focusout", () => show(pinned));
  toolbar.addEventListener("click", event => {
    const word = findWord(event);
    if (word) pin(word === pinned ? null : word);
  });
  toolbar.addEventListener("keydown", event => {
    if (event.key === "Escape") pin(null);
    const last = buttons.length - 1, index = buttons.indexOf(event.target);
    const target = { ArrowLeft: Math.max(index - 1, 0), ArrowRight: Math.min(index + 1, last), Home: 0, End: last }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    buttons[target].focus();
  });
  const lastWord = createElement("span", "last"); // keeps the end token on the line of the last word
  lastWord.append(...buttons.slice(words.length - 1));
  toolbar.append(...buttons.slice(0, words.length - 1).flatMap(button => [button, " "]), lastWord);
  frame.append(canvas);
  return toolbar;
}
