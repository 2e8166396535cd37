// Where the captioner looked: the words of a caption are buttons, and each lays its map over the picture.
const HEAT = 112; // pixels of a side of the map once it is smooth

// Cubic B-splines: smooth, and nowhere below 0. Stretches each of the rows to HEAT numbers, and turns rows to columns.
function stretch(values, rows) {
  const side = values.length / rows, stretched = new Float32Array(HEAT * rows);
  for (let x = 0; x < HEAT; x++) {
    const at = ((x + 0.5) * side) / HEAT - 0.5, first = Math.floor(at) - 1, t = at - first - 1;
    const weights = [(1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, 3 * (t + t ** 2 - t ** 3) + 1, t ** 3];
    const places = weights.map((_, k) => Math.min(Math.max(first + k, 0), side - 1));
    for (let row = 0; row < rows; row++)
      stretched[x * rows + row] = weights.reduce((sum, weight, k) => sum + (weight * values[row * side + places[k]]) / 6, 0);
  }
  return stretched;
}

// From clear over red and orange to yellow.
function colour(heat) {
  const mix = (from, to, share) => from + (to - from) * Math.min(Math.max(share, 0), 1);
  return [mix(200, 255, 2 * heat), mix(20, 240, 1.6 * heat - 0.5), mix(60, 90, 2 * heat - 1), 185 * heat ** 1.1];
}
function draw(canvas, values) {
  const heats = stretch(stretch(values, Math.sqrt(values.length)), HEAT), peak = Math.max(...heats);
  const pixels = new ImageData(HEAT, HEAT);
  heats.forEach((heat, place) => pixels.data.set(colour(heat / peak), 4 * place));
  canvas.width = canvas.height = HEAT;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// The same in words: the ninth of the picture that has the strongest look, if one stands out.
function describe(values) {
  const side = Math.sqrt(values.length), third = place => Math.floor((3 * (place + 0.5)) / side);
  const sums = new Float32Array(9), counts = new Float32Array(9);
  values.forEach((value, place) => {
    const zone = 3 * third(Math.floor(place / side)) + third(place % side);
    sums[zone] += value;
    counts[zone]++;
  });
  const means = sums.map((sum, zone) => sum / (counts[zone] || 1)), highest = Math.max(...means);
  if (highest < (1.5 * values.reduce((sum, value) => sum + value, 0)) / values.length) return "looks all over the picture";
  const zone = means.indexOf(highest);
  const names = [["top", "", "bottom"][Math.floor(zone / 3)], ["left", "", "right"][zone % 3]];
  return `looks most at the ${names.filter(Boolean).join(" ") || "middle"}`;
}

// The caption as buttons. One of them is reached with Tab, the others from there with the arrow keys.
function lookAt(item, frame) {
  const line = element("p", "caption"), canvas = element("canvas", "heat");
  canvas.setAttribute("aria-hidden", "true");
  line.setAttribute("role", "toolbar");
  line.setAttribute("aria-label", "the caption word by word: choose one to see where the captioner looked");
  const maps = item.looks.map(text => Uint8Array.from(atob(text), sign => sign.charCodeAt(0)));
  const words = item.caption.split(" ").filter(Boolean);
  const buttons = maps.map((values, place) => {
    const ends = place >= words.length, word = element("button", "word", ends ? "." : words[place]);
    Object.assign(word, { type: "button", tabIndex: place ? -1 : 0, ariaPressed: "false" });
    word.setAttribute("aria-label", `${ends ? "the end" : words[place]}: ${describe(values)}`);
    return word;
  });
  let kept = null;
  function show(word) {
    for (const button of buttons) button.classList.toggle("shown", button === word);
    frame.classList.toggle("seen", word !== null);
    if (word) draw(canvas, maps[buttons.indexOf(word)]);
  }
  function keep(word) {
    kept = word;
    for (const button of buttons) button.ariaPressed = String(button === word);
    show(word);
  }
  const over = event => event.target.closest(".word");
  line.addEventListener("pointerover", event => event.pointerType === "mouse" && over(event) && show(over(event)));
  line.addEventListener("pointerleave", () => show(kept));
  line.addEventListener("focusin", event => {
    for (const button of buttons) button.tabIndex = button === event.target ? 0 : -1;
    if (event.target.matches(":focus-visible")) show(event.target);
  });
  line.addEventListener("focusout", () => show(kept));
  line.addEventListener("click", event => over(event) && keep(over(event) === kept ? null : over(event)));
  line.addEventListener("keydown", event => {
    const last = buttons.length - 1, place = buttons.indexOf(event.target);
    const to = { ArrowLeft: Math.max(place - 1, 0), ArrowRight: Math.min(place + 1, last), Home: 0, End: last }[event.key];
    if (event.key === "Escape") keep(null);
    if (to === undefined) return;
    event.preventDefault();
    buttons[to].focus();
  });
  const tail = element("span", "tail"); // the end is never alone on a line
  tail.append(...buttons.slice(words.length - 1));
  line.append(...buttons.slice(0, words.length - 1).flatMap(word => [word, " "]), tail);
  frame.append(canvas);
  return line;
}
