"""Runs all stages with all folders in a bucket of an S3 server."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from click.testing import CliRunner

from benchmarks.simulated_kills import Killed
from captionlib.data.shards import update
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import JOURNAL_FILE, UPDATE_FOLDER
from captionlib.storage.folders import Folder, write_file
from captionlib.storage.lock import LOCK_FILE
from jobs.cli import captionlib
from tests.object_storage.conftest import COLORS, options

BUCKET = "s3://bucket/flow"
ENCODER = [
    "--set=encoder.model=squeezenet1_1",
    "--set=encoder.node=features.4.cat",
    "--set=encoder.pooling=mean",
    "--weights=random:0",
]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(captionlib, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def rows(folder: str) -> list[dict[str, Any]]:
    dataset = open_dataset(folder).require_complete()
    table = pa.concat_tables([dataset.read(shard) for shard in range(dataset.shards)])
    ordered: list[dict[str, Any]] = table.sort_by("image_id").to_pylist()
    return ordered


@pytest.fixture(scope="module")
def flow(store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Runs all stages and returns the output of `query`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", options(store))
        patch.setenv("CAPTIONLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        lines = [
            f"{name},{BUCKET.rsplit('/', 1)[0]}/images/{name}.png,{split},a {name} field"
            for name, split in [*((one, "train") for one in [*COLORS, "broken"]), ("missing", "val")]
        ]
        lines += ["brown,s3://bucket/images/red.png,val,a brown field"]
        write_file(f"{BUCKET}/captions.csv", "\n".join(["image_id,uri,split,caption", *lines]).encode())
        quiet = ["--no-progress", "--max-failure-ratio=0.5"]
        small = ["--no-progress", "--set=training.epochs=1", "--set=min_count=1"]
        run("prepare", f"{BUCKET}/captions.csv", "-o", f"{BUCKET}/manifest", "--shard-size=4")
        run("extract-features", f"{BUCKET}/manifest", "-o", f"{BUCKET}/features", *ENCODER, *quiet)
        run("train-captioner", f"{BUCKET}/features", "-o", f"{BUCKET}/captioner", *small)
        run("train-ranker", f"{BUCKET}/features", "-o", f"{BUCKET}/ranker", *small)
        run("generate-captions", f"{BUCKET}/features", f"-c{BUCKET}/captioner", f"-o{BUCKET}/captions", *quiet)
        run("embed", f"{BUCKET}/features", "-r", f"{BUCKET}/ranker", "-o", f"{BUCKET}/embeddings", *quiet)
        run("build-index", f"{BUCKET}/captions", f"--embeddings={BUCKET}/embeddings", "-o", f"{BUCKET}/index")
        results = run(
            "query", f"{BUCKET}/index", "--image", "s3://bucket/images/red.png", "--ranker", f"{BUCKET}/ranker"
        )
        again = run("build-index", f"{BUCKET}/captions", f"--embeddings={BUCKET}/embeddings", "-o", f"{BUCKET}/index")
        assert "nothing" in again or "0 shards added" in again
        return results


def test_image_query_returns_the_image(flow: str) -> None:
    first_rows = flow.splitlines()[2:4]
    assert sorted(row.split()[0] for row in first_rows) == ["brown", "red"]


def test_bucket_and_local_outputs_are_equal(flow: str, store: str, tmp_path: Path) -> None:
    quiet = ["--no-progress", "--max-failure-ratio=0.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", options(store))
        run("prepare", f"{BUCKET}/captions.csv", "-o", f"{tmp_path}/manifest", "--shard-size=4")
        run("extract-features", f"{tmp_path}/manifest", "-o", f"{tmp_path}/features", *ENCODER, *quiet)
        run("generate-captions", f"{tmp_path}/features", f"-c{BUCKET}/captioner", f"-o{tmp_path}/captions", *quiet)
        for name in ("manifest", "features", "captions"):
            assert rows(f"{tmp_path}/{name}") == rows(f"{BUCKET}/{name}")
            assert open_dataset(f"{BUCKET}/{name}").verify() == []
        failures = open_dataset(f"{BUCKET}/features").compute_totals().reasons
        assert failures == {"Truncated": 1, "NotFound": 1}
        assert Folder(BUCKET).list("__temporary") == []


def test_killed_update_of_a_bucket_is_completed_by_the_next_reader(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", options(store))
    folder = Folder("s3://bucket/update")
    for name in ("a", "b", "c", "d"):
        folder.write(f"images/{name}.png", name.encode())
    arguments = ("prepare", f"{folder.uri}/images", "-o", f"{folder.uri}/manifest", "--shard-size=2", "--allow-removal")
    run(*arguments)
    before = {row["image_id"]: row["version"] for row in rows(f"{folder.uri}/manifest")}
    assert "already prepared" in run(*arguments)
    folder.write("images/a.png", b"new")
    folder.remove_file("images/d.png")
    folder.write("images/e.png", b"e")
    with monkeypatch.context() as patch:
        patch.setattr(update, "complete_update", lambda folder: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(*arguments)
    manifest = Folder(f"{folder.uri}/manifest")
    assert manifest.exists(JOURNAL_FILE)
    after = {row["image_id"]: row["version"] for row in rows(manifest.uri)}
    assert after.keys() == {f"{name}.png" for name in "abce"}
    assert {name for name in after if before.get(name) == after[name]} == {"b.png", "c.png"}
    assert open_dataset(manifest.uri).verify() == []
    assert not manifest.exists(JOURNAL_FILE)
    assert manifest.list(UPDATE_FOLDER) == []
    assert "already prepared" in run(*arguments)
    assert not manifest.exists(LOCK_FILE)


def test_endpoint_is_read_from_the_environment(flow: str, store: str) -> None:
    environment = {"FSSPEC_S3_ENDPOINT_URL": store, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    command = [sys.executable, "-m", "captionlib", "inspect", f"{BUCKET}/manifest"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert f"{BUCKET}/manifest: manifest, complete" in done.stdout


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("captions", "captions, complete"), ("index", "index, complete"), ("captioner", "checkpoint")],
)
def test_inspect_recognizes_each_kind_of_folder(
    flow: str, store: str, monkeypatch: pytest.MonkeyPatch, folder: str, expected: str
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", options(store))
    assert f"{BUCKET}/{folder}: {expected}" in run("inspect", f"{BUCKET}/{folder}")
