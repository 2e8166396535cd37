from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from fastapi import FastAPI
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from captionlib.errors import BusyError
from captionlib.serving.thumbnails import ThumbnailSize
from tests.browser import find_violations, needs_browser, open_browser

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
    return [
        entry["message"] for entry in entries if not any(name in entry["message"] for name in ("id=gone", "/nothing"))
    ]


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
    browser.find_element(By.XPATH, "//label[contains(., 'Description')]").click()
    wait_for(browser, "document.querySelectorAll('.cards li').length > 3")
    assert "mode=sentence" in browser.current_url
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
        if active.get_attribute("class") == "open":
            break
    assert {"mode", "split", "button", "a"} <= reached
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


def test_further_pages_load_while_scrolling(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/?q=dog+cat+pizza+train+horse+snow")
    assert len(captions(browser)) == 48
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    wait_for(browser, "document.querySelectorAll('.cards li').length > 70")
    assert "page=2" in browser.current_url, "a reload shows the page that was reached"
    browser.get(browser.current_url)
    assert "page 2" in browser.find_element(By.CLASS_NAME, "summary").text
    browser.find_element(By.CSS_SELECTOR, "a[rel=prev]").click()
    wait_for(browser, "document.querySelector('.summary').textContent.indexOf('page') < 0")
    assert console_errors(browser) == []


def test_images_of_a_row_have_one_height_and_their_aspect_ratios(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/?q=dog")
    wait_for(browser, "[...document.querySelectorAll('.cards img')].slice(0, 8).every(image => image.naturalWidth)")
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.cards img')].slice(0, 8).map(image => {"
        "const box = image.getBoundingClientRect();"
        "return [box.top, box.height, box.width / box.height, image.naturalWidth / image.naturalHeight] })"
    )
    for top, height, ratio, natural in boxes:
        assert ratio == pytest.approx(natural, abs=0.035)
        assert all(abs(height - other[1]) < 1 for other in boxes if other[0] == top)
    assert len({round(ratio, 1) for _, _, ratio, _ in boxes}) == 2


def test_grid_can_be_used_by_keyboard(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/?q=dog")
    body = browser.find_element(By.TAG_NAME, "body")
    browser.execute_script("document.querySelector('.open').focus()")
    shown = captions(browser)

    def press(key: str) -> str:
        browser.switch_to.active_element.send_keys(key)
        return browser.switch_to.active_element.find_element(By.CLASS_NAME, "caption").text

    assert press(Keys.ARROW_RIGHT) == shown[1]
    assert press(Keys.ARROW_DOWN) in shown[2:]
    assert press(Keys.ARROW_UP) in shown[:3]
    press("x")
    assert browser.find_element(By.CSS_SELECTOR, "#selection output").text == "1 selected"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    wait_for(browser, "location.pathname == '/image'")
    at = int(parse_qs(urlsplit(browser.current_url).query)["at"][0])
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_RIGHT)
    wait_for(browser, f"location.search.includes('at={at + 1}')")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    wait_for(browser, "location.pathname == '/' && location.search == '?q=dog'")


def test_filters_are_in_the_address_and_keep_the_focus(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/?q=dog")
    total = int(browser.find_element(By.CLASS_NAME, "summary").text.split()[0])
    for name, value in (("split", "val"), ("date", "2026-04")):
        select = browser.find_element(By.ID, name)
        select.find_element(By.CSS_SELECTOR, f"option[value='{value}']").click()
        wait_for(browser, f"location.search.includes('{name}={value}') && !document.querySelector('[aria-busy=true]')")
    filtered = int(browser.find_element(By.CLASS_NAME, "summary").text.split()[0])
    assert 0 < filtered < total
    assert f"({filtered})" in browser.find_element(By.CSS_SELECTOR, "#date :checked").text
    browser.refresh()
    assert browser.find_element(By.CLASS_NAME, "summary").text.split()[0] == str(filtered)
    browser.find_element(By.CSS_SELECTOR, ".cards .open").click()
    wait_for(browser, "location.pathname == '/image'")
    assert "split=val" in browser.find_element(By.CSS_SELECTOR, ".back a").get_attribute("href")
    browser.get(f"{site}/?q=dog&split=val")
    browser.find_element(By.LINK_TEXT, "Clear filters").click()
    wait_for(browser, "location.search == '?q=dog'")
    assert console_errors(browser) == []


def test_words_show_their_attention_maps(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/image?id=im3")
    words = browser.find_elements(By.CLASS_NAME, "word")
    assert [word.text for word in words] == ["a", "dog", "and", "a", "horse", "."]
    words[1].click()
    covered = browser.execute_script(
        "const [crop, image] = [...document.querySelectorAll('.crop.highlighted, figure img')]"
        ".sort((a, b) => a.tagName > b.tagName ? 1 : -1).map(each => each.getBoundingClientRect());"
        "return [crop.width / crop.height, crop.height / image.height]"
    )
    assert covered == [pytest.approx(1, abs=0.02), pytest.approx(0.875, abs=0.02)], "the square crop in the center"
    words[1].send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.text == "and"
    assert console_errors(browser) == []


@pytest.mark.parametrize("page", ["/?q=dog", "/image?id=im3", "/failures", "/docs", "/nothing"])
@pytest.mark.parametrize(
    "event", ["ClipboardEvent('paste', { clipboardData: data })", "DragEvent('drop', { dataTransfer: data })"]
)
def test_image_is_searched_wherever_it_is_pasted_or_dropped(
    site: str, browser: WebDriver, page: str, event: str
) -> None:
    browser.get(site + page)
    browser.execute_script(
        "const data = new DataTransfer(), canvas = document.createElement('canvas');"
        "canvas.toBlob(blob => {"
        "  data.items.add(new File([blob], 'given.png', { type: 'image/png' }));"
        f"  document.dispatchEvent(new {event});"
        "})"
    )
    wait_for(browser, "location.pathname == '/image-search'")
    assert browser.find_element(By.TAG_NAME, "h1").text == "given.png"
    browser.get_log("browser")


def test_card_under_the_mouse_can_be_selected_and_offers_similar_images(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/?q=dog")
    link = browser.find_element(By.CLASS_NAME, "more")
    select = browser.find_element(By.CLASS_NAME, "select")
    assert [each.value_of_css_property("opacity") for each in (link, select)] == ["0", "0"]
    ActionChains(browser).move_to_element(browser.find_element(By.CSS_SELECTOR, ".cards img")).perform()
    assert [each.value_of_css_property("opacity") for each in (link, select)] == ["1", "1"]
    image_id = parse_qs(urlsplit(link.get_attribute("href") or "").query)["similar_to"][0]
    link.click()
    wait_for(browser, f"document.querySelector('.summary').textContent.includes('Images like {image_id}')")
    assert len(captions(browser)) > 10
    assert console_errors(browser) == []


def test_escape_closes_a_panel_and_then_returns_to_the_results(site: str, browser: WebDriver) -> None:
    browser.get(f"{site}/image?id=im3&q=dog&at=3")
    button = browser.find_element(By.CLASS_NAME, "by-image")
    button.click()
    assert browser.find_element(By.ID, "upload").is_displayed()
    button.send_keys(Keys.ESCAPE)
    wait_for(browser, "!document.querySelector(':popover-open')")
    assert "/image?" in browser.current_url
    button.send_keys(Keys.ESCAPE)
    wait_for(browser, "location.pathname == '/'")


def test_box_searches_from_every_page(site: str, browser: WebDriver) -> None:
    for page in ("/image?id=im3&q=dog&at=3", "/failures", "/docs", "/nothing"):
        browser.get(site + page)
        box = browser.find_element(By.ID, "q")
        box.clear()
        box.send_keys("+dog +frisbee", Keys.ENTER)
        wait_for(browser, summary_starts_with("4 images"))
    browser.get_log("browser")


def test_search_by_image(site: str, browser: WebDriver, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (90, 70), "teal").save(tmp_path / "teal.png")
    browser.get(site)
    browser.find_element(By.CLASS_NAME, "by-image").click()
    browser.find_element(By.ID, "image").send_keys(str(tmp_path / "teal.png"))
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


PAGES = (
    *("/", "/?q=dog", "/?q=%2Bdog+%2Bgiraffe", "/?q=dog&date=2026-03&split=val", "/?similar_to=im3"),
    *("/image?id=im3&q=dog&at=3", "/failures", "/docs", "/nothing"),
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1200, 900)])
def test_pages_fit_the_screen_and_are_accessible(
    site: str, browser: WebDriver, width: int, height: int, scheme: str
) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    for page in PAGES:
        browser.get(site + page)
        if page == "/docs":
            wait_for(browser, "document.querySelectorAll('.opblock').length > 5")
            for operation in browser.find_elements(By.CLASS_NAME, "opblock-summary-control"):
                browser.execute_script("arguments[0].click()", operation)
            wait_for(browser, "document.querySelectorAll('.opblock .responses-table').length > 5")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page
        assert find_violations(browser) == [], page
    assert console_errors(browser) == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_pages_load_nothing_from_other_hosts_and_do_not_shift(site: str, browser: WebDriver) -> None:
    for page in PAGES:
        browser.get(site + page)
        wait_for(browser, "document.readyState == 'complete'")
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(url.startswith((site, "data:")) for url in loaded)
    browser.get(f"{site}/?q=dog")
    shift = browser.execute_async_script(
        "const done = arguments[0]; let total = 0;"
        "new PerformanceObserver(list => list.getEntries().forEach(entry => total += entry.value))"
        ".observe({ type: 'layout-shift', buffered: true }); setTimeout(() => done(total), 300)"
    )
    assert shift < 0.1
