"""The embedded data set: scenes of one shape each, drawn by the project itself, with five sentences for each.

A scene is one of 540 combinations of shape, color, position, size and background. Combinations of the held-out scenes are
never drawn for training, and drawings of one combination differ in position, size, hue and noise.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "IMAGE_SIZE",
    "Scene",
    "describe_scene",
    "iterate_scenes",
    "parse_attributes",
    "read_scenes",
    "render_scene",
    "score_attributes",
    "write_scenes",
]

IMAGE_SIZE = 224
_SUPERSAMPLING = 2

# Of each attribute the values, and the words that say them; the first is the value's own name.
_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {"ring": ("ring", "hoop"), "square": ("square", "box"), "triangle": ("triangle",)},
    "color": {name: (name,) for name in ("red", "green", "blue", "yellow", "magenta", "cyan")},
    "position": {
        "top": ("at the top", "near the top"),
        "bottom": ("at the bottom", "near the bottom"),
        "left": ("on the left", "to the left"),
        "right": ("on the right", "to the right"),
        "center": ("in the center", "in the middle"),
    },
    "size": {"small": ("small", "little"), "large": ("large", "big")},
    "background": {"white": ("white",), "gray": ("gray",), "black": ("black",)},
}

_TEMPLATES = (
    "a {size} {color} {shape} {position} of a {background} background",
    "there is a {size} {color} {shape} {position} on {background}",
    "a {color} {shape} that is {size} stands {position} before a {background} background",
    "{position} of the {background} picture is a {size} {color} {shape}",
    "the {shape} {position} is {size} and {color} and all around it is {background}",
    "one {size} {shape} in {color} lies {position} on a {background} ground",
    "we see a {background} background and a {size} {color} {shape} {position}",
)

_COLORS = {
    "red": (220, 30, 30),
    "green": (30, 150, 40),
    "blue": (30, 50, 220),
    "yellow": (240, 225, 30),
    "magenta": (215, 40, 205),
    "cyan": (40, 205, 220),
}
_BACKGROUNDS = {"white": (238, 238, 238), "gray": (128, 128, 128), "black": (18, 18, 18)}
_POSITIONS = {
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "center": (0.5, 0.5),
}
_HALF_WIDTHS = {"small": 0.14, "large": 0.24}
_HOLE = 0.55  # of a ring, beside its radius


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    shape: str
    color: str
    position: str
    size: str
    background: str


def write_scenes(folder: Path, train: int = 1000, val: int = 100, test: int = 200, seed: int = 0) -> Path:
    """Draws a data set: `images/`, and their sentences as `dataset.json` in Karpathy's layout.

    Args:
        folder: where to.
        train: pictures to learn from, of about five in six of the combinations.
        val: pictures to choose the best epoch by, of held-out combinations, as `test`.
        test: pictures to be captioned.
        seed: of everything that is drawn.

    Returns:
        The path of `dataset.json`.
    """
    rng = random.Random(seed)
    scenes = list(iterate_scenes())
    rng.shuffle(scenes)
    held_out, seen = scenes[: len(scenes) // 6], scenes[len(scenes) // 6 :]
    splits = [("train", seen, train), ("val", held_out[::2], val), ("test", held_out[1::2], test)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, object]] = []
    for split, combinations, count in splits:
        for number in range(count):
            scene = combinations[number % len(combinations)]
            name = f"{split}-{number:05d}.jpg"
            render_scene(scene, rng).save(folder / "images" / name, quality=95)
            sentences = [{"raw": text, "tokens": text.split()} for text in describe_scene(scene, rng)]
            entries.append(
                {
                    "imgid": len(entries),
                    "filepath": "images",
                    "filename": name,
                    "split": split,
                    "sentences": sentences,
                    "attributes": asdict(scene),
                }
            )
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "scenes", "images": entries}), encoding="utf-8")
    return path


def read_scenes(folder: Path) -> dict[str, Scene]:
    """The scenes that `write_scenes` drew into a folder, by image id."""
    entries = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["images"]
    return {str(entry["imgid"]): Scene(**entry["attributes"]) for entry in entries}


def iterate_scenes() -> Iterator[Scene]:
    """Every combination of attributes, in a fixed order."""
    return itertools.starmap(Scene, itertools.product(*_WORDS.values()))


def render_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """A picture of a scene, `IMAGE_SIZE` pixels square; no two calls draw the same."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    ground, color = _vary(_BACKGROUNDS[scene.background], 3, rng), _vary(_COLORS[scene.color], 8, rng)
    x, y = (side * (part + rng.uniform(-0.015, 0.015)) for part in _POSITIONS[scene.position])
    half = side * _HALF_WIDTHS[scene.size] * rng.uniform(0.95, 1.05)
    picture = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(picture)
    if scene.shape == "ring":
        pen.circle((x, y), half, fill=color)
        pen.circle((x, y), _HOLE * half, fill=ground)
    elif scene.shape == "square":
        pen.rectangle((x - half, y - half, x + half, y + half), fill=color)
    else:
        pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=color)
    small = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 2, (IMAGE_SIZE, IMAGE_SIZE, 1))
    return Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8))


def describe_scene(scene: Scene, rng: random.Random, count: int = 5) -> list[str]:
    """Different sentences about a scene, each of which says all five attributes."""
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        template = rng.choice(_TEMPLATES)
        words = {name: rng.choice(_WORDS[name][getattr(scene, name)]) for name in _WORDS}
        sentences[template.format(**words)] = None
    return list(sentences)


def parse_attributes(sentence: str) -> dict[str, str | None]:
    """What a sentence says of a scene, by attribute; None where it says nothing, or two things at once."""
    text = f" {sentence} "
    for ending in (" background ", " picture ", " ground "):
        text = text.replace(ending, " ")
    found = {}
    for field in fields(Scene):
        values = {
            value for value, phrases in _WORDS[field.name].items() if any(f" {phrase} " in text for phrase in phrases)
        }
        found[field.name] = values.pop() if len(values) == 1 else None
    return found


def score_attributes(scenes: Sequence[Scene], sentences: Sequence[str]) -> dict[str, float]:
    """The share of sentences that are right in each attribute, and in `all` of them."""
    said = [parse_attributes(sentence) for sentence in sentences]
    right = {
        field.name: [got[field.name] == getattr(scene, field.name) for got, scene in zip(said, scenes, strict=True)]
        for field in fields(Scene)
    }
    right["all"] = [all(row) for row in zip(*right.values(), strict=True)]
    return {name: sum(rows) / max(1, len(rows)) for name, rows in right.items()}


def _vary(color: tuple[int, int, int], by: int, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, part + rng.randint(-by, by))) for part in color)
    return red, green, blue
