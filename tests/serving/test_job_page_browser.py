import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from captionlib.data.shards.markers import write_marker
from captionlib.serving import job_page
from captionlib.serving.job_page import create_job_app
from captionlib.serving.server import configure_server, listen
from tests.browser import find_violations, needs_browser, open_browser
from tests.data.shards.test_inspection import write

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(tmp_path: Path, browser: WebDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Opens the page of a dataset with 2 of 3 finished shards, one of which has a failure."""
    monkeypatch.setattr(job_page, "_MIN_RENDER_INTERVAL_SECONDS", 0.0)
    read_asset = job_page.read_asset
    monkeypatch.setattr(job_page, "read_asset", lambda name: read_asset(name).replace(b"SECONDS = 5", b"SECONDS = 0.2"))
    dataset = write(tmp_path / "data", done=2)
    for marker in dataset.read_markers().values():
        write_marker(dataset.folder, replace(marker, seconds=5.0))
    with listen("127.0.0.1", 0) as server_socket:
        server = uvicorn.Server(configure_server(create_job_app(tmp_path / "data", ["127.0.0.1"])))
        thread = threading.Thread(target=server.run, args=[[server_socket]])
        thread.start()
        try:
            browser.get(f"http://127.0.0.1:{server_socket.getsockname()[1]}/")
            yield
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.usefixtures("page")
def test_page_updates_itself_and_keeps_what_is_open(browser: WebDriver, tmp_path: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, "#reason-Truncated summary").click()
    assert browser.title.startswith("66%")
    write(tmp_path / "data", done=3).finish(max_failure_ratio=1)
    WebDriverWait(browser, 20).until(lambda _: browser.find_element(By.CLASS_NAME, "state").text == "Complete")
    assert browser.title.startswith("data")
    WebDriverWait(browser, 20).until(lambda _: browser.find_elements(By.ID, "reason-NotFound"))
    assert not browser.find_element(By.ID, "reason-Truncated").get_attribute("open")
    assert browser.get_log("browser") == []


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_page_is_accessible_and_fits_the_screen(browser: WebDriver, scheme: str, width: int) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert find_violations(browser) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
