// Keys: "/" goes to the search box. In a grid, the arrow keys move between images and "x" selects one. On the page of an
// image, the left and right arrows go to the previous and next result, and Escape goes back to the results.

const LINKS = { ArrowLeft: "prev", ArrowRight: "next", Escape: "up" };

function isTyping(element) {
  return element.matches("input:not([type=radio], [type=checkbox]), select, textarea");
}

function focusSearch() {
  const input = document.getElementById("q");
  input?.focus();
  input?.select();
  return Boolean(input);
}

// Returns the nearest card in the previous or next row.
function findInOtherRow(cards, current, sign) {
  const { left, top } = current.getBoundingClientRect();
  const rows = cards.map((card) => ({ card, box: card.getBoundingClientRect() }));
  const others = rows.filter(({ box }) => sign * (box.top - top) > 10);
  others.sort((a, b) => sign * (a.box.top - b.box.top) || Math.abs(a.box.left - left) - Math.abs(b.box.left - left));
  return others[0]?.card;
}

function move(item, key) {
  const cards = [...item.parentElement.children];
  const position = cards.indexOf(item);
  const target = {
    ArrowLeft: () => cards[position - 1],
    ArrowRight: () => cards[position + 1],
    ArrowUp: () => findInOtherRow(cards, item, -1),
    ArrowDown: () => findInOtherRow(cards, item, 1),
  }[key]?.();
  target?.querySelector(".open").focus();
  return Boolean(target);
}

function follow(rel) {
  const link = document.querySelector(`.back a[rel=${rel}]`);
  link?.click();
  return Boolean(link);
}

function handle(event) {
  if (event.key === "/") return focusSearch();
  const item = event.target.closest(".cards li");
  if (item && event.key === "x") {
    item.querySelector(".select input")?.click();
    return true;
  }
  if (item && move(item, event.key)) return true;
  return !item && event.key in LINKS && !event.target.matches("input") && follow(LINKS[event.key]);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
  if (document.querySelector(":popover-open")) return; // Escape closes it
  if (handle(event)) event.preventDefault();
});
