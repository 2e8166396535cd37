import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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


def test_every_combination_is_a_scene() -> None:
    assert len(SCENES) == len(set(SCENES)) == 3 * 6 * 5 * 2 * 3


@given(scenes, seeds)
def test_every_sentence_reads_back_to_its_scene(scene: Scene, seed: int) -> None:
    sentences = describe_scene(scene, random.Random(seed))
    assert len(sentences) == len(set(sentences)) == 5
    for sentence in sentences:
        assert parse_attributes(sentence) == asdict(scene)
        assert parse_attributes(" ".join(tokenize(sentence))) == asdict(scene), "also as a captioner writes it"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("", {}),
        ("a red dog", {"color": "red"}),
        ("a red and blue ring on the left", {"shape": "ring", "position": "left"}),
        ("a small big square", {"shape": "square"}),
        ("redder rings", {}),
        ("a white background", {"background": "white"}),
    ],
)
def test_what_a_sentence_does_not_say_or_says_twice_is_none(sentence: str, expected: dict[str, str]) -> None:
    assert parse_attributes(sentence) == {**dict.fromkeys(asdict(SCENES[0])), **expected}


def test_the_vocabulary_is_compact() -> None:
    rng = random.Random(0)
    words = Counter(word for scene in SCENES for text in describe_scene(scene, rng) for word in tokenize(text))
    assert len(words) <= 60
    assert min(words.values()) >= 5


@given(scenes, seeds)
def test_a_picture_shows_its_scene(scene: Scene, seed: int) -> None:
    picture = render_scene(scene, random.Random(seed))
    assert (picture.size, picture.mode) == ((IMAGE_SIZE, IMAGE_SIZE), "RGB")
    pixels = np.asarray(picture).astype(int)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    shape = np.abs(pixels - ground).max(axis=2) > 40
    rows, columns = np.nonzero(shape)
    grounds = {"white": ground.min() > 200, "gray": 100 < ground.mean() < 150, "black": ground.max() < 50}
    assert grounds[scene.background]
    assert (np.sqrt(np.ptp(rows) * np.ptp(columns)) > 0.38 * IMAGE_SIZE) == (scene.size == "large")
    position = (
        (columns.min() + columns.max()) / 2 / IMAGE_SIZE - 0.5,
        (rows.min() + rows.max()) / 2 / IMAGE_SIZE - 0.5,
    )
    positions = {"top": (0, -0.25), "bottom": (0, 0.25), "left": (-0.25, 0), "right": (0.25, 0), "center": (0, 0)}
    assert min(positions, key=lambda name: np.hypot(*np.subtract(positions[name], position))) == scene.position
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 3, "nothing is cut off"
    middle = shape[int(rows.mean()), int(columns.mean())]
    assert middle == (scene.shape != "ring")


def test_no_two_drawings_are_the_same() -> None:
    rng = random.Random(0)
    assert len({render_scene(SCENES[0], rng).tobytes() for _ in range(10)}) == 10


def written(folder: Path, seed: int = 0) -> dict[str, bytes]:
    write_scenes(folder, train=30, val=4, test=6, seed=seed)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seed_draws_the_same_again_and_another_one_does_not(tmp_path: Path) -> None:
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert written(tmp_path / "a") != written(tmp_path / "c", seed=1)


def test_held_out_combinations_are_never_seen_in_training(tmp_path: Path) -> None:
    path = write_scenes(tmp_path, train=480, val=46, test=46)
    images = json.loads(path.read_text())["images"]
    seen: dict[str, set[Scene]] = {split: set() for split in ("train", "val", "test")}
    for image in images:
        seen[image["split"]].add(Scene(**image["attributes"]))
    assert not seen["train"] & (seen["val"] | seen["test"])
    assert not seen["val"] & seen["test"]
    assert len(seen["train"]) == 450
    assert Counter(image["split"] for image in images) == {"train": 480, "val": 46, "test": 46}


def test_prepare_reads_the_data_set(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "scenes", train=12, val=2, test=3)
    prepare(path, tmp_path / "manifest", PrepareConfig(shard_size=100))
    rows = open_dataset(tmp_path / "manifest").require_complete().read(0).to_pylist()
    drawn = read_scenes(tmp_path / "scenes")
    assert sorted(row["image_id"] for row in rows) == sorted(drawn)
    for row in rows:
        assert Image.open(row["uri"]).size == (IMAGE_SIZE, IMAGE_SIZE)
        assert len(row["captions"]) == 5
        assert all(parse_attributes(text) == asdict(drawn[row["image_id"]]) for text in row["captions"])


def test_attributes_are_scored_one_by_one_and_together() -> None:
    right = Scene("ring", "red", "left", "small", "white")
    said = [
        "a small red ring on the left of a white background",
        "a big red hoop on the left of a white background",
        "a red square",
    ]
    assert score_attributes([right] * 3, said) == pytest.approx(
        {"shape": 2 / 3, "color": 1, "position": 2 / 3, "size": 1 / 3, "background": 2 / 3, "all": 1 / 3}
    )
