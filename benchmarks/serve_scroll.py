"""Scrolls through a thousand thumbnails in Chromium and measures the longest frame and the failed images."""

import argparse
import tempfile
import time
from pathlib import Path

from selenium.webdriver.remote.webdriver import WebDriver

from benchmarks.bars import report, run_benchmark
from benchmarks.page_data import prepare_page_data
from benchmarks.search_data import WORDS
from benchmarks.server import serve
from tests.browser import open_browser

THUMBNAILS = 1000
PIXELS_PER_FRAME = 30
MAX_SECONDS = 300
MAX_MILLISECONDS = 50.0

_SCROLL = """
const [pixels, wanted] = arguments, shown = () => document.querySelectorAll(".cards img").length;
window.frames_ = [];
window.done_ = false;
window.long_ = [];
new PerformanceObserver((list) => window.long_.push(...list.getEntries())).observe({ type: "long-animation-frame" });
let last = performance.now();
function step(now) {
  window.frames_.push(now - last);
  last = now;
  scrollBy(0, pixels);
  if (shown() >= wanted && scrollY + innerHeight > document.body.scrollHeight - 2000) window.done_ = true;
  else requestAnimationFrame(step);
}
requestAnimationFrame(step);
"""
# The parts of a long frame: scripts before the rendering, its callbacks, and style and layout.
_LIST_LONG_FRAMES = """
return window.long_.sort((a, b) => b.duration - a.duration).slice(0, 3).map((frame) => [
  frame.duration, frame.renderStart - frame.startTime, frame.styleAndLayoutStart - frame.renderStart,
  frame.startTime + frame.duration - frame.styleAndLayoutStart,
]);
"""
_COUNT_FAILED = """
return [...document.querySelectorAll(".cards img")].filter((image) => image.complete && !image.naturalWidth).length;
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    data = prepare_page_data(parser.parse_args().rows)
    with (
        serve(data.index, data.thumbnails) as (port, _),
        tempfile.TemporaryDirectory() as profile,
        open_browser(Path(profile) / "profile") as browser,
    ):
        browser.get(f"http://127.0.0.1:{port}/?q={WORDS[0]}")
        time.sleep(2)
        frames = _scroll(browser)
        long_frames = browser.execute_script(_LIST_LONG_FRAMES)
        failed = browser.execute_script(_COUNT_FAILED)
        shown = browser.execute_script("return document.querySelectorAll('.cards img').length")
    frames.sort()
    print(f"# {shown} thumbnails, {len(frames)} frames, median {frames[len(frames) // 2]:.0f} ms")
    for duration, *parts in long_frames:
        scripts, callbacks, layout = (f"{part:.0f}" for part in parts)
        print(f"# frame of {duration:.0f} ms: {scripts} scripts, {callbacks} callbacks, {layout} style and layout")
    report("serve-scroll-longest-frame-milliseconds", frames[-1], MAX_MILLISECONDS, at_least=False)
    report("serve-scroll-failed-images", failed, 0, at_least=False)


def _scroll(browser: WebDriver) -> list[float]:
    """Scrolls at a constant speed, and returns the duration of each frame in milliseconds."""
    browser.execute_script(_SCROLL, PIXELS_PER_FRAME, THUMBNAILS)
    deadline = time.monotonic() + MAX_SECONDS
    while not browser.execute_script("return window.done_") and time.monotonic() < deadline:
        time.sleep(1)
    frames: list[float] = browser.execute_script("return window.frames_")
    return frames[1:]


if __name__ == "__main__":
    run_benchmark(main)
