// Makes each word of the caption show its attention map on the image; attention_maps.js draws the maps.
"use strict";

const figure = document.getElementById("attention"), caption = document.getElementById("caption");
const crop = createElement("div", "crop");
const [left, top_, width, height] = figure.dataset.crop.split(" ").map((fraction) => `${100 * fraction}%`);
Object.assign(crop.style, { left, top: top_, width, height });
figure.append(crop);
const words = createWordButtons({ caption: caption.textContent, attention: figure.dataset.maps.split(" ") }, crop);
words.className = "words";
caption.classList.add("visually-hidden");
caption.after(words);
