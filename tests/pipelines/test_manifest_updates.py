"""Stages that run again after an update of their manifest."""

import json
from pathlib import Path

from click.testing import CliRunner

from captionlib.data.shards.dataset import open_dataset
from captionlib.search.index import open_index
from jobs.cli import captionlib
from tests.pipelines.conftest import COLORS, write_images
from tests.pipelines.test_embed_images import train_small_ranker


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(captionlib, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_shard_without_images_passes_all_stages(tmp_path: Path, trained: Path, extracted: Path) -> None:
    write_images(tmp_path / "images")
    ranker = train_small_ranker(extracted, tmp_path / "ranker")
    names = ["source.csv", "manifest", "features", "captions", "embeddings", "index", "duplicates"]
    source, manifest, features, captions, embeddings, index, duplicates = (tmp_path / name for name in names)
    encoder = ["squeezenet1_1", "features.4.cat", "mean"]
    settings = [
        f"--set=encoder.{key}={value}" for key, value in zip(["model", "node", "pooling"], encoder, strict=True)
    ]
    left = [*COLORS[:2], *COLORS[4:]]  # all images of the second of four shards are missing
    for colors in (COLORS, left):
        rows = [
            f"{name},images/{name}.png,{'val' if name in COLORS[4:] else 'train'},a {name} field" for name in colors
        ]
        source.write_text("\n".join(["id,url,split,caption", *rows]))
        run("prepare", source, "-o", manifest, "--shard-size=2", "--allow-removal", "--no-progress")
        run("extract-features", manifest, "-o", features, *settings, "--weights=random:0", "--no-progress")
        run("generate-captions", features, "-c", trained, "-o", captions, "--no-progress")
        run("embed", features, "-r", ranker, "-o", embeddings, "--no-progress")
        run("build-index", captions, "--embeddings", embeddings, "-o", index)
    for folder in (manifest, features, captions, embeddings):
        dataset = open_dataset(folder).require_complete()
        ids = [dataset.read(shard)["image_id"].to_pylist() for shard in range(dataset.shards)]
        assert ids == [left[:2], [], left[2:4], left[4:]]
        assert dataset.verify() == []
        counted = run("query", folder, "--sql", f"SELECT count(*) AS n FROM {dataset.kind}", "--format", "jsonl")
        assert json.loads(counted) == {"n": 6}
    assert sorted(open_index(index).sample(10)["image_id"].to_pylist()) == sorted(left)
    assert COLORS[2] not in run("query", index, "--image-id", left[0], "--limit", "10")
    run("deduplicate", embeddings, "-o", duplicates)
    training = ["--set=training.epochs=1", "--set=min_count=1", "--no-progress"]
    run("train-captioner", features, "-o", tmp_path / "captioner", *training)
    run("train-ranker", features, "-o", tmp_path / "second-ranker", *training)
    assert "BLEU" in run("evaluate", captions, "--manifest", manifest)
