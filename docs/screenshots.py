"""Takes screenshots of the pages of `serve` and of the report: `make screenshots`."""

import json
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from selenium.webdriver.remote.webdriver import WebDriver

from tests.browser import open_browser

IMAGES = Path(__file__).parent / "images"
PORT = 8642


SIZES = {"desktop": (1200, 900), "phone": (390, 780)}


def main(demo: Path) -> None:
    """Builds an index of the demo's captions and takes screenshots of every kind of page."""
    _run("train-ranker", demo / "features", "-o", demo / "ranker", "--set", "training.epochs=10", "--no-progress")
    _run("embed", demo / "features", "-r", demo / "ranker", "-o", demo / "embeddings", "--no-progress")
    thumbnails = "--thumbnails", demo / "thumbnails"
    _run("build-index", demo / "captions", "--embeddings", demo / "embeddings", "-o", demo / "index", *thumbnails)
    server = _start("serve", demo / "index", "--ranker", demo / "ranker", "--port", PORT, *thumbnails)
    try:
        _wait_for_server()
        with open_browser(demo / "profile") as browser:
            _take_pages(browser, demo)
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
    }
    for name, path in pages.items():
        _take(browser, site + path, name)
        _take(browser, site + path, f"{name}-dark", scheme="dark")
        _take(browser, site + path, f"{name}-phone", device="phone")
    _take(browser, (demo / "report" / "index.html").resolve().as_uri(), "report")


def _run(*command: object) -> None:
    subprocess.run([sys.executable, "-m", "jobs.cli", *map(str, command)], check=True)


def _start(*command: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "jobs.cli", *map(str, command)])


def _wait_for_server() -> None:
    for _ in range(600):
        try:
            with urlopen(f"http://127.0.0.1:{PORT}/health"):
                return
        except URLError:
            time.sleep(0.1)
    raise TimeoutError("the server did not start within a minute")


def _take(browser: WebDriver, address: str, name: str, device: str = "desktop", scheme: str = "light") -> None:
    width, height = SIZES[device]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": device == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(address)
    time.sleep(3)
    IMAGES.mkdir(exist_ok=True)
    browser.save_screenshot(str(IMAGES / f"{name}.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
