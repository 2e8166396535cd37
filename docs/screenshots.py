"""Takes screenshots of the pages of `serve`, `report`, `activations` and `inspect`: `make screenshots`."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from selenium.webdriver.remote.webdriver import WebDriver

from tests.browser import open_browser

IMAGES = Path(__file__).parent / "images"
PORT, JOB_PORT = 8642, 8643
JOB_SHARDS = 12  # shards of the job that are done when its page is shown

# `job` ends above the failed images, because their paths depend on the machine.
SIZES = {"desktop": (1200, 900), "job": (1200, 650), "phone": (390, 780)}


def main(demo: Path) -> None:
    """Builds an index of the demo's captions and takes screenshots of every kind of page."""
    _run("train-ranker", demo / "features", "-o", demo / "ranker", "--set", "training.epochs=10", "--no-progress")
    _run("embed", demo / "features", "-r", demo / "ranker", "-o", demo / "embeddings", "--no-progress")
    thumbnails = "--thumbnails", demo / "thumbnails"
    _run("build-index", demo / "captions", "--embeddings", demo / "embeddings", "-o", demo / "index", *thumbnails)
    server = _start("serve", demo / "index", "--ranker", demo / "ranker", "--port", PORT, *thumbnails)
    try:
        _wait_for_server(PORT)
        with open_browser(demo / "profile") as browser:
            _take_pages(browser, demo)
            _take_reports(browser, demo)
            _take_job(browser, demo)
    finally:
        server.terminate()
        server.wait()


def _take_pages(browser: WebDriver, demo: Path) -> None:
    site = f"http://127.0.0.1:{PORT}"
    with urlopen(f"{site}/api/v1/search?q=red+ring") as response:
        image_id = json.load(response)["results"][0]["image_id"]
    pages = {
        "home": "/",
        "search": "/?q=red+ring",
        "image": f"/image?{urlencode({'q': 'red ring', 'id': image_id, 'at': 0})}",
        "no-results": "/?q=%2Bmagneta+%2Bhoop",
        "api": "/docs",
        "not-found": "/nothing",
    }
    for name, path in pages.items():
        _take(browser, site + path, name)
        _take(browser, site + path, f"{name}-dark", scheme="dark")
        _take(browser, site + path, f"{name}-phone", device="phone")


def _take_reports(browser: WebDriver, demo: Path) -> None:
    """Shows the report of the demo, a comparison of beam search with sampling, and the activations of an image."""
    _take_file(browser, demo / "report" / "index.html", "report")
    sampling = "--set", "decoding.strategy=sample", "--set", "decoding.temperature=0.9", "--set", "decoding.n_best=1"
    sampled = demo / "captions-sampled"
    _run("generate-captions", demo / "features", "-c", demo / "captioner", "-o", sampled, *sampling, "--no-progress")
    options = "-m", demo / "manifest", "--split", "test", "--compare", sampled, "-o", demo / "comparison"
    _run("report", demo / "captions", *options, "--no-progress")
    _take_file(browser, demo / "comparison" / "index.html", "comparison")
    image = next(iter(sorted(demo.glob("scenes/**/*.jpg"))))
    _run("activations", image, "-o", demo / "activations.html", "--weights", "random:0")
    _take_file(browser, demo / "activations.html", "activations")


def _take_file(browser: WebDriver, page: Path, name: str) -> None:
    _take(browser, page.resolve().as_uri(), name)
    _take(browser, page.resolve().as_uri(), f"{name}-phone", device="phone", scheme="dark")


def _take_job(browser: WebDriver, demo: Path) -> None:
    """Extracts features of the demo's images, some of which are damaged, and shows the page of the running job."""
    scenes = demo / "damaged"
    shutil.copytree(demo / "scenes", scenes, dirs_exist_ok=True)
    for number, path in enumerate(sorted(scenes.rglob("*.jpg")) or sorted(scenes.rglob("*.png"))):
        if number % 45 == 7:
            path.write_bytes(path.read_bytes()[:400])
        elif number % 80 == 11:
            path.unlink()
    _run("prepare", scenes / "dataset.json", "-o", demo / "damaged-manifest", "--shard-size", 20)
    features = demo / "damaged-features"
    job = _start(
        "extract-features", demo / "damaged-manifest", "-o", features, "--weights", "random:0", "--no-progress"
    )
    server = None
    try:
        while job.poll() is None and len(list(features.glob("__shards/*.json"))) < JOB_SHARDS:
            time.sleep(1)
        server = _start("inspect", features, "--serve", "--port", JOB_PORT)
        _wait_for_server(JOB_PORT)
        site = f"http://127.0.0.1:{JOB_PORT}/"
        _take(browser, site, "job", device="job")
        _take(browser, site, "job-phone", device="phone", scheme="dark")
    finally:
        for process in filter(None, (server, job)):
            process.terminate()
            process.wait()


def _run(*command: object) -> None:
    subprocess.run([sys.executable, "-m", "captionlib", *map(str, command)], check=True)


def _start(*command: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "captionlib", *map(str, command)])


def _wait_for_server(port: int) -> None:
    for _ in range(600):
        try:
            with urlopen(f"http://127.0.0.1:{port}/health"):
                return
        except HTTPError:  # the page of a job has no such address
            return
        except URLError:
            time.sleep(0.1)
    raise TimeoutError("the server did not start within a minute")


def _take(browser: WebDriver, address: str, name: str, device: str = "desktop", scheme: str = "light") -> None:
    width, height = SIZES[device]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": device == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": device == "phone"})
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(address)
    time.sleep(3)
    IMAGES.mkdir(exist_ok=True)
    browser.save_screenshot(str(IMAGES / f"{name}.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
