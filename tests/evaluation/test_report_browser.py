from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from captionlib.evaluation.crop_and_attention import CropAndAttention
from captionlib.evaluation.predictions import Prediction
from captionlib.evaluation.report import write_report
from tests.browser import find_violations, needs_browser, open_browser

pytestmark = needs_browser


def make_map(*cells: tuple[int, int]) -> np.ndarray:
    values = np.zeros((6, 6), np.uint8)
    for cell in cells:
        values[cell] = 255
    return values


# Attention at the top left, at the bottom right, everywhere, and, for the end token, at the top.
MAPS = np.stack([make_map((0, 0)), make_map((5, 5), (5, 4)), np.full((6, 6), 255, np.uint8), make_map((0, 2), (0, 3))])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(tmp_path: Path, browser: WebDriver) -> Path:
    """Opens a report of an image with attention maps and one without."""
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.png")
    predictions = [Prediction(name, "a dog runs", str(tmp_path / "photo.png")) for name in ("x", "y")]
    path = Path(
        write_report(
            tmp_path / "report",
            "Captions",
            predictions,
            crop_and_attention=CropAndAttention(attention_maps={"x": MAPS}),
        )
    )
    browser.get(path.as_uri())
    return path


def read_labels(browser: WebDriver) -> list[str]:
    labels = browser.execute_script(
        "return [...document.querySelectorAll('.word')].map(word => word.getAttribute('aria-label'))"
    )
    assert isinstance(labels, list)
    return labels


def read_active_word(browser: WebDriver) -> str | None:
    """Returns the word whose map is overlaid on the image."""
    active = browser.execute_script(
        "return [...document.querySelectorAll('.highlighted ~ .text .active')].map(word => word.textContent)"
    )
    assert len(active) <= 1
    return active[0] if active else None


def read_opacity(browser: WebDriver) -> np.ndarray:
    """Returns the opacity of the map, `[height, width]`, 0 to 255."""
    numbers = browser.execute_script(
        "const {width, height} = document.querySelector('.attention');"
        "const pixels = document.querySelector('.attention').getContext('2d').getImageData(0, 0, width, height);"
        "return [...pixels.data].filter((_, index) => index % 4 === 3)"
    )
    return np.array(numbers).reshape(round(len(numbers) ** 0.5), -1)


def test_labels_describe_where_the_attention_is(browser: WebDriver, page: Path) -> None:
    assert read_labels(browser) == [
        "a: attention on the top left",
        "dog: attention on the bottom right",
        "runs: attention on the whole image",
        "end: attention on the top",
    ]
    captions = [caption.text for caption in browser.find_elements(By.CSS_SELECTOR, "#cards .caption")]
    assert captions == ["a dog runs.", "a dog runs"]
    assert browser.get_log("browser") == []


def test_mouse_shows_maps_and_a_click_keeps_one_visible(browser: WebDriver, page: Path) -> None:
    first, second, *_ = browser.find_elements(By.CLASS_NAME, "word")
    assert read_active_word(browser) is None
    ActionChains(browser).move_to_element(first).perform()
    assert read_active_word(browser) == "a"
    ActionChains(browser).move_to_element(second).click().move_to_element(first).perform()
    assert read_active_word(browser) == "a"
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert read_active_word(browser) == "dog"
    assert second.get_attribute("aria-pressed") == "true"
    ActionChains(browser).move_to_element(second).click().perform()
    assert read_active_word(browser) is None


def test_map_is_drawn_where_the_attention_is(browser: WebDriver, page: Path) -> None:
    first, second, everywhere, _ = browser.find_elements(By.CLASS_NAME, "word")
    first.click()
    opacity = read_opacity(browser)
    size = len(opacity)
    assert np.unravel_index(opacity.argmax(), opacity.shape) < (size / 6, size / 6)
    assert opacity[size // 2 :, size // 2 :].max() == 0
    second.click()
    opacity = read_opacity(browser)
    assert opacity[size // 2 :, size // 2 :].max() > 150
    assert opacity[: size // 2].max() == 0
    everywhere.click()
    assert np.ptp(read_opacity(browser)) <= 1
    box = browser.execute_script(
        "return ['.image', '.attention'].map(selector => "
        "JSON.stringify(document.querySelector(selector).getBoundingClientRect()))"
    )
    assert box[0] == box[1]


def test_keyboard_moves_through_the_words(browser: WebDriver, page: Path) -> None:
    browser.find_element(By.ID, "order").send_keys(Keys.TAB)
    words = [read_active_word(browser)]
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.END, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.HOME, Keys.ENTER):
        browser.switch_to.active_element.send_keys(key)
        words.append(read_active_word(browser))
    assert words == ["a", "dog", "runs", ".", ".", "runs", "a", "a"]
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert read_active_word(browser) == "a", "after Enter, the map stays visible when Tab leaves the caption"
    assert "word" not in (browser.switch_to.active_element.get_attribute("class") or "")
    browser.find_element(By.CLASS_NAME, "word").send_keys(Keys.ESCAPE)
    assert read_active_word(browser) is None


def test_tap_shows_and_hides_a_map(browser: WebDriver, page: Path) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        browser.refresh()
        word = browser.find_elements(By.CLASS_NAME, "word")[1]
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", word)
        box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", word)
        assert min(box["width"], box["height"]) >= 24
        point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for expected in ("dog", None):
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            assert read_active_word(browser) == expected
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_rows_of_best_and_worst_scroll_horizontally(browser: WebDriver, tmp_path: Path) -> None:
    predictions = [Prediction(str(number), "a dog runs") for number in range(20)]
    attributes = {one.image_id: {"shape": True, "color": False} for one in predictions}
    cider = {one.image_id: float(number) for number, one in enumerate(predictions)}
    browser.get(
        Path(write_report(tmp_path / "report", "Captions", predictions, attributes=attributes, cider=cider)).as_uri()
    )
    row = browser.find_element(By.ID, "best")
    assert browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", row)
    width, available = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width <= available


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_is_accessible(page: Path, browser: WebDriver, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert find_violations(browser) == []
