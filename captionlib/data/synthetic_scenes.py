"""Generates a synthetic captioning dataset. Each image shows a single shape and has five captions.

A scene is one of 540 combinations of shape, color, position, size and background. The validation and test sets contain
only scenes that do not occur in the training set. Images of a scene vary slightly in position, size, hue and noise.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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

# The values of each attribute, and the phrases that express each value.
_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
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
    "a {color} {shape} that is {size} sits {position} against a {background} background",
    "{position} of the {background} image is a {size} {color} {shape}",
    "the {shape} {position} is {size} and {color} and all around it is {background}",
    "one {size} {shape} in {color} lies {position} on a {background} background",
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
# Centers (x, y) and half widths of the shapes, as fractions of the image size.
_POSITIONS = {
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "center": (0.5, 0.5),
}
_HALF_WIDTHS = {"small": 0.14, "large": 0.24}


@dataclass(frozen=True)
class Scene:
    """The content of an image."""

    shape: str
    color: str
    position: str
    size: str
    background: str


def write_scenes(folder: Path, train: int = 1000, val: int = 100, test: int = 200, seed: int = 0) -> Path:
    """Writes `images/` and `dataset.json` (captions in Karpathy's format), and returns the path of `dataset.json`.

    `train`, `val` and `test` are numbers of images. The scenes are split in the ratio 10:1:1 between these sets.
    """
    rng = random.Random(seed)
    scenes = list(iterate_scenes())
    rng.shuffle(scenes)
    held_out, training = scenes[: len(scenes) // 6], scenes[len(scenes) // 6 :]
    splits = [("train", training, train), ("val", held_out[::2], val), ("test", held_out[1::2], test)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, object]] = []
    for split, split_scenes, count in splits:
        for number, scene in enumerate(itertools.islice(itertools.cycle(split_scenes), count)):
            name = f"{split}-{number:05d}.jpg"
            render_scene(scene, rng).save(folder / "images" / name, quality=95)
            sentences = [{"raw": caption, "tokens": caption.split()} for caption in describe_scene(scene, rng)]
            entry = {"imgid": len(entries), "filepath": "images", "filename": name, "split": split}
            entries.append({**entry, "sentences": sentences, "attributes": asdict(scene)})
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "scenes", "images": entries}), encoding="utf-8")
    return path


def read_scenes(folder: Path) -> dict[str, Scene]:
    """Reads a folder that `write_scenes` wrote, and returns the scene of each image by image id."""
    entries = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["images"]
    return {str(entry["imgid"]): Scene(**entry["attributes"]) for entry in entries}


def iterate_scenes() -> Iterator[Scene]:
    """Yields every combination of attributes, in a fixed order."""
    return itertools.starmap(Scene, itertools.product(*_PHRASES.values()))


def render_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Renders an RGB image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels. `rng` varies position, size, hue and noise."""
    side = 2 * IMAGE_SIZE  # supersampled
    background, color = _jitter(_BACKGROUNDS[scene.background], 3, rng), _jitter(_COLORS[scene.color], 8, rng)
    x, y = (side * (coordinate + rng.uniform(-0.015, 0.015)) for coordinate in _POSITIONS[scene.position])
    half = side * _HALF_WIDTHS[scene.size] * rng.uniform(0.95, 1.05)
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    if scene.shape == "ring":
        draw.circle((x, y), half, fill=color)
        draw.circle((x, y), 0.55 * half, fill=background)
    elif scene.shape == "square":
        draw.rectangle((x - half, y - half, x + half, y + half), fill=color)
    else:
        draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=color)
    small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 2, (IMAGE_SIZE, IMAGE_SIZE, 1))
    return Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8))


def describe_scene(scene: Scene, rng: random.Random, count: int = 5) -> list[str]:
    """Returns `count` different captions, each of which expresses all five attributes."""
    captions: dict[str, None] = {}  # an insertion-ordered set
    while len(captions) < count:
        template = rng.choice(_TEMPLATES)
        phrases = {name: rng.choice(_PHRASES[name][getattr(scene, name)]) for name in _PHRASES}
        captions[template.format(**phrases)] = None
    return list(captions)


def parse_attributes(caption: str) -> dict[str, str | None]:
    """Returns the value that a caption mentions for each attribute; None if it mentions no value or several values."""
    text = f" {caption} "
    attributes = {}
    for name, options in _PHRASES.items():
        values = [value for value, phrases in options.items() if any(f" {phrase} " in text for phrase in phrases)]
        attributes[name] = values[0] if len(values) == 1 else None
    return attributes


def score_attributes(scenes: Sequence[Scene], captions: Sequence[str]) -> dict[str, float]:
    """Returns the fraction of captions with the correct value, by attribute; `all` is for all attributes together."""
    pairs = [(asdict(scene), parse_attributes(caption)) for scene, caption in zip(scenes, captions, strict=True)]
    correct = {name: [actual[name] == parsed[name] for actual, parsed in pairs] for name in _PHRASES}
    correct["all"] = [actual == parsed for actual, parsed in pairs]
    return {name: sum(flags) / max(1, len(flags)) for name, flags in correct.items()}


def _jitter(color: tuple[int, int, int], amount: int, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in color)
    return red, green, blue
