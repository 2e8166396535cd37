"""Runs the commands of the tutorials in order, on small data sets laid out as the real ones.

Options that make the networks small are added to the commands. Java is hidden, because METEOR takes seconds per call.
"""

import asyncio
import json
import random
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from click.testing import CliRunner

from captionlib.data.shards.dataset import open_dataset
from captionlib.data.synthetic_scenes import describe_scene, iterate_scenes, render_scene
from captionlib.models.families import huggingface
from jobs.cli import captionlib
from tests.docs.markdown import DOCS, read_commands, read_python
from tests.jobs.test_serve import free_port
from tests.models.families.tiny_models import write_blip

# The tutorials search for these words.
SENTENCE = "two men and a dog run through the water on the beach"

TRAINING = ["training.epochs=1", "training.learning_rate=0.01", "batch_images=4"]
CAPTIONER = ["min_count=1", "captioner.hidden_size=16", "captioner.embedding_size=16"]
MAPS = ["captioner.attention_size=16", "captioner.encoder_top=features.10.expand3x3_activation"]
RANKER = ["min_count=1", "ranker.hidden_size=16", "ranker.embedding_size=16", "ranker.joint_embedding_size=16"]
NARROW_BEAM = ["decoding.beam_width=6", "decoding.rerank.pool_size=6", "decoding.rerank.neighbors=4"]
SQUEEZENET = ["encoder.model=squeezenet1_1", "encoder.weights=random:0"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr(uvicorn.Server, "run", serve_one_request)
    return tmp_path


def serve_one_request(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
    """Serves in a thread until /health has answered. Starting `serve` as a process would cost seconds."""
    thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets),))
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.05)
        host, port = sockets[0].getsockname()[:2]
        with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=60) as response:
            assert json.load(response)["captions"] > 0
    finally:
        server.should_exit = True
        thread.join()


def write_images(paths: Sequence[Path]) -> list[list[str]]:
    """Renders an image to each path and returns five captions for each."""
    rng = random.Random(0)
    scenes = list(iterate_scenes())
    rng.shuffle(scenes)
    captions = []
    for path, scene in zip(paths, scenes, strict=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        render_scene(scene, rng).save(path)
        captions.append([*describe_scene(scene, rng, count=4), SENTENCE])
    return captions


def write_flickr8k(folder: Path) -> None:
    splits = {
        split: [f"{number}_{number:010x}.jpg" for number in range(first, last)]
        for split, first, last in (("train", 100, 112), ("dev", 200, 204), ("test", 300, 304))
    }
    names = [*[name for names in splits.values() for name in names], "667626_18933d713e.jpg"]  # the last in no split
    captions = write_images([folder / "Flicker8k_Dataset" / name for name in names])
    lines = [
        f"{name}#{number}\t{text} ."
        for name, texts in zip(names, captions, strict=True)
        for number, text in enumerate(texts)
    ]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, selected in splits.items():
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(selected) + "\n")


def write_coco(folder: Path) -> None:
    """Writes COCO's own annotations and Karpathy's JSON, which takes restval, val and test from val2014."""
    ids = {"train2014": range(9, 21), "val2014": range(42, 52)}
    files = [
        (year, image_id, f"COCO_{year}_{image_id:012d}.jpg") for year, numbers in ids.items() for image_id in numbers
    ]
    captions = write_images([folder / year / name for year, _, name in files])
    images, entries = {"train2014": [], "val2014": []}, []  # type: ignore[var-annotated]
    annotations = {"train2014": [], "val2014": []}  # type: ignore[var-annotated]
    for number, ((year, image_id, name), texts) in enumerate(zip(files, captions, strict=True)):
        images[year].append({"id": image_id, "file_name": name, "width": 224, "height": 224, "license": 1})
        first = 1000 * image_id
        annotations[year] += [{"id": first + k, "image_id": image_id, "caption": t} for k, t in enumerate(texts)]
        split = "train" if year == "train2014" else ("restval", "val", "test")[number % 3]
        sentences = [
            {"raw": text, "tokens": text.split(), "imgid": number, "sentid": first + k} for k, text in enumerate(texts)
        ]
        entries.append(
            {"imgid": number, "cocoid": image_id, "filepath": year, "filename": name, "split": split}
            | {"sentids": [sentence["sentid"] for sentence in sentences], "sentences": sentences}
        )
    (folder / "annotations").mkdir()
    for year in ids:
        document = {"info": {"year": 2014}, "licenses": [], "images": images[year], "annotations": annotations[year]}
        (folder / "annotations" / f"captions_{year}.json").write_text(json.dumps(document))
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": entries}))


def shrink(command: Sequence[str]) -> list[str]:
    """Adds options to a command that make it fast: a small network, one epoch, a narrow beam."""
    name, recipe = command[0], command[command.index("--config") + 1] if "--config" in command else ""
    settings, options = [], []
    if name == "extract-features":
        node = "features.9.squeeze_activation" if recipe == "flickr8k-pool4" else "features.7.cat"
        pooling = "none" if recipe == "flickr8k-pool4" else "mean"
        settings = [*SQUEEZENET, f"encoder.node={node}", f"encoder.pooling={pooling}"]
    elif name == "train-captioner":
        settings = [*TRAINING, "best_by=perplexity"]
        settings += CAPTIONER if command[1] != "manifest" else []
        settings += MAPS if recipe in ("flickr8k-bag-of-words", "flickr8k-attention") else []
    elif name == "train-ranker":
        settings = [*TRAINING, *RANKER]
    elif name == "generate-captions":
        settings = NARROW_BEAM if recipe == "flickr8k" else ["decoding.beam_width=5"]
    elif name == "evaluate":
        options = ["--bootstrap-samples", "10", *(["--protocol", "all"] if "--protocol" in command else [])]
    if name in ("extract-features", "generate-captions", "build-datastore"):
        settings += ["loading.decode.processes=1"]
    return [*command, *(word for setting in settings for word in ("--set", setting)), *options]


def run(command: Sequence[str]) -> str:
    if command[0] == "serve":
        command = [*command, "--port", str(free_port()), "--thumbnails", "thumbnails"]
    result = CliRunner().invoke(captionlib, shrink(command))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"captionlib {' '.join(command)}") from result.exception
    assert result.exit_code == 0, f"captionlib {' '.join(command)}\n{result.output}"
    return result.output


def count_rows(dataset: str) -> int:
    totals = open_dataset(dataset).require_complete().read_totals()
    assert totals is not None
    return totals.rows


def test_flickr8k_tutorial_runs(folder: Path) -> None:
    write_flickr8k(folder)
    commands = read_commands(DOCS / "tutorials/flickr8k.md", only_shell=True)
    output = {" ".join(command): run(command) for command in commands}
    summary = next(text for command, text in output.items() if command.startswith("prepare "))
    assert [line.split()[:2] for line in summary.splitlines() if " split " in line and "skipped" not in line] == [
        ["split", "dev"],
        ["split", "test"],
        ["split", "train"],
    ]
    assert "not in any split file" in summary
    assert count_rows("captions") == count_rows("better") == count_rows("attended") == 20
    assert (folder / "report" / "index.html").exists()
    assert (folder / "attention-report" / "index.html").exists()


def test_coco_tutorial_runs(folder: Path) -> None:
    write_coco(folder)
    commands = read_commands(DOCS / "tutorials/coco.md", only_shell=True)
    output = {" ".join(command): run(command) for command in commands}
    summary = next(text for command, text in output.items() if "dataset_coco.json" in command)
    assert all(f"split {split} " in summary for split in ("train", "restval", "val", "test"))
    official = next(text for command, text in output.items() if "captions_train2014.json" in command)
    assert "split train" in official
    assert "split val" in official
    assert count_rows("captions") == count_rows("captions-finetuned") == 22
    results = json.loads((folder / "captions_val2014_results.json").read_text())
    assert all(row["image_id"] in range(42, 52) and row.keys() == {"image_id", "caption"} for row in results)
    assert json.loads((folder / "scores" / "scores.json").read_text())["images"] == len(results)


def test_get_started_runs_and_other_tools_read_its_captions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blip = write_blip(folder / "blip")
    monkeypatch.setattr(huggingface, "_download", lambda _location: blip)
    write_images([folder / "image.jpg", folder / "other.jpg", folder / "images/one.jpg", folder / "images/two.jpg"])
    (folder / "images/broken.jpg").write_bytes(b"not an image")
    commands = read_commands(DOCS / "get-started.md", only_shell=True)
    assert [command[0] for command in commands].count("demo") == 1
    output = {" ".join(command): run(command) for command in commands if command[0] != "demo"}  # it takes minutes
    captions = next(text for command, text in output.items() if "--json" in command)
    assert [json.loads(line)["uri"] for line in captions.splitlines()] == ["image.jpg", "other.jpg"]
    assert count_rows("captions") == 2
    names: dict[str, Any] = {}
    for code in read_python(DOCS / "how-to/parquet.md", packages=("duckdb", "captionlib", "pyarrow")):
        exec(code, names)
    assert names["table"].num_rows == 2
