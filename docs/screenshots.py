"""Takes the README's screenshots of the search page and the report: `make screenshots` after `make demo`."""

import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tests.browser import open_browser

IMAGES = Path(__file__).parent / "images"
PORT = 8642


def main(demo: Path) -> None:
    """Builds an index of the demo's captions and takes screenshots of its pages."""
    _run("train-ranker", demo / "features", "-o", demo / "ranker", "--set", "training.epochs=10", "--no-progress")
    _run("embed", demo / "features", "-r", demo / "ranker", "-o", demo / "embeddings", "--no-progress")
    _run("build-index", demo / "captions", "--embeddings", demo / "embeddings", "-o", demo / "index")
    command = [sys.executable, "-m", "jobs.cli", "serve", demo / "index", "--ranker", demo / "ranker", "--port", PORT]
    server = subprocess.Popen([*map(str, command), "--thumbnails", str(demo / "thumbnails")])
    try:
        _wait_for_server()
        _take(f"http://127.0.0.1:{PORT}/?q=red+ring", "search", demo / "profile")
        _take((demo / "report" / "index.html").resolve().as_uri(), "report", demo / "profile")
    finally:
        server.terminate()
        server.wait()


def _run(*command: object) -> None:
    subprocess.run([sys.executable, "-m", "jobs.cli", *map(str, command)], check=True)


def _wait_for_server() -> None:
    for _ in range(600):
        try:
            with urlopen(f"http://127.0.0.1:{PORT}/health"):
                return
        except URLError:
            time.sleep(0.1)
    raise TimeoutError("the server did not start within a minute")


def _take(address: str, name: str, profile: Path) -> None:
    with open_browser(profile) as browser:
        browser.set_window_size(1200, 900)
        browser.get(address)
        time.sleep(5)  # thumbnails are made on the first visit
        browser.get(address)
        time.sleep(2)
        IMAGES.mkdir(exist_ok=True)
        browser.save_screenshot(str(IMAGES / f"{name}.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
