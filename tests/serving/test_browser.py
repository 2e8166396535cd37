from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from captionlib.errors import BusyError
from captionlib.serving.thumbnails import ThumbnailSize
from tests.browser import needs_browser, open_browser

from .example_site import MALICIOUS, make_site, serve_site

pytestmark = needs_browser


class Site(str):
    """The URL of a running application."""

    app: FastAPI


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    app = make_site(tmp_path_factory.mktemp("site"), 80)
    with serve_site(app) as url:
        site = Site(url)
        site.app = app
        yield site


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def captions(browser: WebDriver) -> list[str]:
    texts = browser.execute_script("return [...document.querySelectorAll('.caption')].map(e => e.textContent)")
    assert isinstance(texts, list)
    return texts


def wait_for(browser: WebDriver, condition: str) -> None:
    WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(f"return {condition}"))


def summary_starts_with(text: str) -> str:
    return f"document.querySelector('.summary')?.textContent.startsWith({text!r})"


def console_errors(browser: WebDriver) -> list[str]:
    entries: list[dict[str, str]] = browser.get_log("browser")
    return [entry["message"] for entry in entries if "id=gone" not in entry["message"]]


def test_results_appear_while_typing(site: str, browser: WebDriver) -> None:
    browser.get(site)
    box = browser.find_element(By.ID, "q")
    assert browser.switch_to.active_element == box, "the query has the focus"
    box.send_keys("+dog +frisbee")
    wait_for(browser, summary_starts_with("4 images"))
    assert set(captions(browser)) == {"a dog and a frisbee", "a frisbee and a dog"}
    assert "q=%2Bdog+%2Bfrisbee" in browser.current_url
    box.send_keys(" +pizza")
    wait_for(browser, "document.querySelector('.summary').textContent.includes('No results')")
    browser.find_element(By.CSS_SELECTOR, "input[value=sentence]").click()
    wait_for(browser, "document.querySelectorAll('.cards li').length > 3")
    assert console_errors(browser) == []


def test_back_returns_to_the_search(site: str, browser: WebDriver) -> None:
    browser.get(site)
    box = browser.find_element(By.ID, "q")
    box.send_keys("+dog", Keys.ENTER)
    wait_for(browser, summary_starts_with("26 images"))
    box.send_keys(" +frisbee")
    wait_for(browser, summary_starts_with("4 images"))
    search_url = browser.current_url
    browser.find_element(By.CSS_SELECTOR, ".cards a").click()
    wait_for(browser, "location.pathname == '/image'")
    assert browser.find_element(By.CSS_SELECTOR, ".back a").get_attribute("href") == search_url
    browser.back()
    wait_for(browser, summary_starts_with("4 images"))
    assert browser.current_url == search_url
    browser.back()
    wait_for(browser, summary_starts_with("26 images"))
    assert browser.find_element(By.ID, "q").get_attribute("value") == "+dog"
    assert console_errors(browser) == []


def test_page_can_be_used_by_keyboard(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/?q=dog")
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to content"
    body.send_keys("/")
    assert browser.switch_to.active_element.get_attribute("id") == "q"
    reached = set()
    for _ in range(12):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        reached.add(active.get_attribute("name") or active.tag_name)
        if active.tag_name == "a":
            break
    assert {"mode", "split", "summary", "a"} <= reached
    chosen = browser.switch_to.active_element.find_element(By.CLASS_NAME, "caption").text
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    wait_for(browser, "location.pathname == '/image'")
    assert browser.find_element(By.TAG_NAME, "h1").text == chosen


def test_captions_cannot_run_scripts(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/?q=script")
    assert MALICIOUS in " ".join(captions(browser))
    assert browser.title != "stolen"
    browser.find_element(By.CSS_SELECTOR, ".cards a").click()
    wait_for(browser, "location.pathname == '/image'")
    assert MALICIOUS in browser.find_element(By.TAG_NAME, "h1").text
    assert browser.title != "stolen"
    assert console_errors(browser) == []


def test_next_and_previous_page(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/?q=dog+cat+pizza+train")
    first = captions(browser)
    assert len(first) == 24
    browser.find_element(By.CSS_SELECTOR, "a[rel=next]").click()
    wait_for(browser, "location.search.includes('page=2')")
    assert "page 2" in browser.find_element(By.CLASS_NAME, "summary").text
    browser.find_element(By.CSS_SELECTOR, "a[rel=prev]").click()
    wait_for(browser, "location.search.includes('page=1')")
    assert captions(browser) == first


def test_search_by_image(site: str, browser: WebDriver, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (90, 70), "teal").save(tmp_path / "teal.png")
    browser.get(site)
    browser.find_element(By.TAG_NAME, "summary").click()
    browser.find_element(By.ID, "image").send_keys(str(tmp_path / "teal.png"))
    browser.find_element(By.CSS_SELECTOR, ".upload button").click()
    wait_for(browser, "location.pathname == '/image-search'")
    assert browser.find_element(By.TAG_NAME, "h1").text == "teal.png"
    assert len(captions(browser)) == 24
    assert browser.execute_script("return document.querySelector('.image img').naturalWidth") == 90
    assert console_errors(browser) == []
    assert [heading.text for heading in browser.find_elements(By.TAG_NAME, "h2")] == [
        "Similar sentences",
        "Similar images",
    ]


def test_busy_thumbnails_are_loaded_later(site: Site, browser: WebDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    rejected: list[str] = []
    get_thumbnail = site.app.state.thumbnails.get

    async def reject_twice(uri: str, size: ThumbnailSize) -> bytes:
        if rejected.count(uri) < 2:
            rejected.append(uri)
            raise BusyError("busy")
        content: bytes = await get_thumbnail(uri, size)
        return content

    monkeypatch.setattr(site.app.state.thumbnails, "get", reject_twice)
    monkeypatch.setattr("captionlib.serving.app._RETRY_SECONDS", "1")
    browser.get(f"{site}/image?id=im7")
    wait_for(browser, "document.querySelector('.image img').naturalWidth > 0")
    assert max(Counter(rejected).values()) == 2, "the page has tried again after another rejection"
    browser.get_log("browser")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_layout_fits_the_width_and_has_contrast(site: str, browser: WebDriver, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    for page in ("/", "/?q=dog", "/image?id=im3", "/docs", "/nothing"):
        browser.get(site + page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        colors = browser.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor].map("
            "c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 3)"
        )
        assert abs(colors[0] - colors[1]) > 150
        assert (colors[1] < 100) == (scheme == "dark")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
