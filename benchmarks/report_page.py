"""Measures `captionlib report` on 5,000 images with attention maps relative to 500, and its page in Chromium."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from selenium.webdriver.remote.webdriver import WebDriver

from benchmarks.bars import report, run_benchmark
from benchmarks.search_data import WORDS, sample_captions
from benchmarks.synthetic_images import write_images
from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema
from captionlib.data.shards.writer import write_shard
from tests.browser import open_browser

FEW, MANY = 500, 5_000
REFERENCES, CANDIDATES, POSITIONS = 5, 3, 14 * 14

# The observer runs before the scripts of the page.
_OBSERVE_TASKS = """
window.tasks_ = [];
new PerformanceObserver((list) => window.tasks_.push(...list.getEntries().map((entry) => entry.duration)))
  .observe({ type: "longtask", buffered: true });
"""
_READ_FIRST_PAINT = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? Infinity"
_READ_LONGEST_TASK = "return Math.max(0, ...window.tasks_)"
# Types a word of three letters, and waits for the frame that shows the result.
_TYPE = """
const done = arguments[arguments.length - 1], box = document.getElementById("words");
const began = performance.now();
box.value = arguments[0];
box.dispatchEvent(new Event("input", { bubbles: true }));
requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
"""


class Run(NamedTuple):
    """CPU seconds, peak memory in megabytes, and size of the page without images in megabytes."""

    seconds: float
    memory: float
    size: float


class Visit(NamedTuple):
    """Milliseconds until the first paint, of the longest task, and from a letter to the filtered images."""

    first_paint: float
    longest_task: float
    filter: float


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = [str(path) for path in write_images(folder / "images", MANY, 320)]
        few, many = (_write_report(folder / str(count), images[:count]) for count in (FEW, MANY))
        with open_browser(folder / "profile") as browser:
            visit = _visit(browser, folder / str(MANY) / "report" / "index.html")
    for count, run in ((FEW, few), (MANY, many)):
        print(f"# {count:,} images: {run.seconds:.1f} CPU seconds, {run.memory:.0f} MB, page of {run.size:.1f} MB")
    print(f"# first paint {visit.first_paint:.0f} ms")
    report("report-time-per-image", many.seconds / MANY / (few.seconds / FEW), 1.0, at_least=False)
    report("report-memory", many.memory / few.memory, 1.5, at_least=False)
    report("report-page-megabytes", many.size, 5.0, at_least=False)
    report("report-longest-task-milliseconds", visit.longest_task, 200.0, at_least=False)
    report("report-filter-milliseconds", visit.filter, 100.0, at_least=False)


def _write_report(folder: Path, uris: list[str]) -> Run:
    _write_datasets(folder, uris)
    command = [sys.executable, "-m", "captionlib", "report", str(folder / "captions"), "-o", str(folder / "report")]
    command += ["--manifest", str(folder / "manifest"), "--no-progress"]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("the report failed")
    size = sum(path.stat().st_size for path in (folder / "report").glob("*.*"))
    return Run(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, size / 1e6)


def _write_datasets(folder: Path, uris: list[str]) -> None:
    """Writes a manifest with references, and captions with candidates and attention maps."""
    generator = np.random.default_rng(3)
    ids = [f"{number:06d}" for number in range(len(uris))]
    references = [[_sample_caption(generator) for _ in range(REFERENCES)] for _ in uris]
    manifest = create_dataset(folder / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    with write_shard(manifest, 0, len(uris)) as writer:
        columns = {"image_id": ids, "uri": uris, "version": [None] * len(uris), "split": ["test"] * len(uris)}
        writer.write(pa.RecordBatch.from_pydict({**columns, "captions": references}, MANIFEST_SCHEMA))
    manifest.finish()
    marker = manifest.read_marker(0)
    assert marker is not None
    schema = captions_schema(positions=POSITIONS)
    captions = create_dataset(folder / "captions", "captions", schema, config={}, source=manifest)
    with write_shard(captions, 0, len(uris), marker.checksum) as writer:
        for image_id, uri in zip(ids, uris, strict=True):
            writer.write(pa.RecordBatch.from_pylist([_make_row(generator, image_id, uri)], schema=schema))
    captions.finish()


def _make_row(generator: np.random.Generator, image_id: str, uri: str) -> dict[str, object]:
    candidates = [{"caption": _sample_caption(generator), "log_prob": -5.0 - rank} for rank in range(CANDIDATES)]
    tokens = str(candidates[0]["caption"]).count(" ") + 2
    attention = generator.random((tokens, POSITIONS), np.float32).astype(np.float16)
    row = {"image_id": image_id, "uri": uri, "split": "test", "width": 320, "height": 320, "tokens": tokens}
    return {**row, **candidates[0], "candidates": candidates, "attention": list(attention)}


def _sample_caption(generator: np.random.Generator) -> str:
    return sample_captions(generator, generator.integers(8, 14, size=1))[0]


def _visit(browser: WebDriver, page: Path) -> Visit:
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _OBSERVE_TASKS})
    browser.get(page.resolve().as_uri())
    time.sleep(2)
    first_paint, longest_task = browser.execute_script(_READ_FIRST_PAINT), browser.execute_script(_READ_LONGEST_TASK)
    filtered = [browser.execute_async_script(_TYPE, word[:length]) for word in WORDS[:5] for length in (1, 2, 3)]
    return Visit(first_paint, longest_task, max(filtered))


if __name__ == "__main__":
    run_benchmark(main)
