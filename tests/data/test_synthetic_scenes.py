import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.synthetic_scenes import (
    IMAGE_SIZE,
    Scene,
    describe_scene,
    iterate_scenes,
    parse_attributes,
    read_scenes,
    render_scene,
    score_attributes,
    write_scenes,
)
from captionlib.data.text.vocabulary import tokenize

SCENES = list(iterate_scenes())
scenes = st.sampled_from(SCENES)
seeds = st.integers(0, 2**32 - 1)


def test_scenes_are_all_combinations() -> None:
    assert len(SCENES) == len(set(SCENES)) == 3 * 6 * 5 * 2 * 3


@given(scenes, seeds)
def test_every_caption_parses_back_to_its_scene(scene: Scene, seed: int) -> None:
    captions = describe_scene(scene, random.Random(seed))
    assert len(captions) == len(set(captions)) == 5
    for caption in captions:
        assert parse_attributes(caption) == asdict(scene)
        assert parse_attributes(" ".join(tokenize(caption))) == asdict(scene), "as a captioner writes it"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", {}),
        ("a red dog", {"color": "red"}),
        ("a red and blue ring on the left", {"shape": "ring", "position": "left"}),
        ("a small big square", {"shape": "square"}),
        ("redder rings", {}),
        ("a white background", {"background": "white"}),
    ],
)
def test_missing_and_ambiguous_attributes_are_none(caption: str, expected: dict[str, str]) -> None:
    assert parse_attributes(caption) == {**dict.fromkeys(asdict(SCENES[0])), **expected}


def test_the_vocabulary_is_compact() -> None:
    rng = random.Random(0)
    words = Counter(word for scene in SCENES for text in describe_scene(scene, rng) for word in tokenize(text))
    assert len(words) <= 60
    assert min(words.values()) >= 5


@given(scenes, seeds)
def test_image_shows_its_scene(scene: Scene, seed: int) -> None:
    image = render_scene(scene, random.Random(seed))
    assert (image.size, image.mode) == ((IMAGE_SIZE, IMAGE_SIZE), "RGB")
    pixels = np.asarray(image).astype(int)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    shape = np.abs(pixels - background).max(axis=2) > 40
    rows, columns = np.nonzero(shape)
    is_background = {
        "white": background.min() > 200,
        "gray": 100 < background.mean() < 150,
        "black": background.max() < 50,
    }
    assert is_background[scene.background]
    assert (np.sqrt(np.ptp(rows) * np.ptp(columns)) > 0.38 * IMAGE_SIZE) == (scene.size == "large")
    offset = (
        (columns.min() + columns.max()) / 2 / IMAGE_SIZE - 0.5,
        (rows.min() + rows.max()) / 2 / IMAGE_SIZE - 0.5,
    )
    positions = {"top": (0, -0.25), "bottom": (0, 0.25), "left": (-0.25, 0), "right": (0.25, 0), "center": (0, 0)}
    assert min(positions, key=lambda name: np.hypot(*np.subtract(positions[name], offset))) == scene.position
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 3, "the shape is not cut off"
    middle = shape[int(rows.mean()), int(columns.mean())]
    assert middle == (scene.shape != "ring")


def test_images_of_one_scene_differ() -> None:
    rng = random.Random(0)
    assert len({render_scene(SCENES[0], rng).tobytes() for _ in range(10)}) == 10


def write(folder: Path, seed: int = 0) -> dict[str, bytes]:
    write_scenes(folder, train=30, val=4, test=6, seed=seed)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_set_depends_on_the_seed_alone(tmp_path: Path) -> None:
    assert write(tmp_path / "a") == write(tmp_path / "b")
    assert write(tmp_path / "a") != write(tmp_path / "c", seed=1)


def test_splits_share_no_scene(tmp_path: Path) -> None:
    path = write_scenes(tmp_path, train=480, val=46, test=46)
    images = json.loads(path.read_text())["images"]
    scenes: dict[str, set[Scene]] = {split: set() for split in ("train", "val", "test")}
    for image in images:
        scenes[image["split"]].add(Scene(**image["attributes"]))
    assert not scenes["train"] & (scenes["val"] | scenes["test"])
    assert not scenes["val"] & scenes["test"]
    assert len(scenes["train"]) == 450
    assert Counter(image["split"] for image in images) == {"train": 480, "val": 46, "test": 46}


def test_prepare_reads_the_synthetic_data_set(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "scenes", train=12, val=2, test=3)
    prepare(path, tmp_path / "manifest", PrepareConfig(shard_size=100))
    rows = open_dataset(tmp_path / "manifest").require_complete().read(0).to_pylist()
    scenes = read_scenes(tmp_path / "scenes")
    assert sorted(row["image_id"] for row in rows) == sorted(scenes)
    for row in rows:
        assert Image.open(row["uri"]).size == (IMAGE_SIZE, IMAGE_SIZE)
        assert len(row["captions"]) == 5
        assert all(parse_attributes(text) == asdict(scenes[row["image_id"]]) for text in row["captions"])


def test_score_attributes_counts_each_and_all() -> None:
    scene = Scene("ring", "red", "left", "small", "white")
    captions = [
        "a small red ring on the left of a white background",
        "a big red hoop on the left of a white background",
        "a red square",
    ]
    assert score_attributes([scene] * 3, captions) == pytest.approx(
        {"shape": 2 / 3, "color": 1, "position": 2 / 3, "size": 1 / 3, "background": 2 / 3, "all": 1 / 3}
    )
