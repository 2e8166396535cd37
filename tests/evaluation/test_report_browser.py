from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from captionlib.evaluation.image_views import Sight
from captionlib.evaluation.predictions import Prediction
from captionlib.evaluation.report import write_report
from tests.browser import needs_browser, open_browser

pytestmark = needs_browser


def spot(*cells: tuple[int, int]) -> np.ndarray:
    values = np.zeros((6, 6), np.uint8)
    for cell in cells:
        values[cell] = 255
    return values


# A look at the top left, one at the bottom right, one everywhere, and the last one at the top: the end.
MAPS = np.stack([spot((0, 0)), spot((5, 5), (5, 4)), np.full((6, 6), 255, np.uint8), spot((0, 2), (0, 3))])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(tmp_path: Path, browser: WebDriver) -> Path:
    """A picture with maps and one without; a phone or a mouse may be the pointer."""
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.png")
    said = [Prediction(name, "a dog runs", str(tmp_path / "photo.png")) for name in ("x", "y")]
    path = Path(write_report(tmp_path / "report", "Captions", said, sight=Sight(maps={"x": MAPS})))
    browser.get(path.as_uri())
    return path


def words(browser: WebDriver) -> list[str]:
    names = browser.execute_script(
        "return [...document.querySelectorAll('.word')].map(word => word.getAttribute('aria-label'))"
    )
    assert isinstance(names, list)
    return names


def shown(browser: WebDriver) -> str | None:
    """The word whose map lies over the picture."""
    found = browser.execute_script(
        "return [...document.querySelectorAll('.seen ~ .text .shown')].map(word => word.textContent)"
    )
    assert len(found) <= 1
    return found[0] if found else None


def heat(browser: WebDriver) -> np.ndarray:
    """How strongly the map covers the picture, `[height, width]`, 0 to 255."""
    numbers = browser.execute_script(
        "const {width, height} = document.querySelector('.heat');"
        "const pixels = document.querySelector('.heat').getContext('2d').getImageData(0, 0, width, height);"
        "return [...pixels.data].filter((_, place) => place % 4 === 3)"
    )
    return np.array(numbers).reshape(round(len(numbers) ** 0.5), -1)


def test_words_tell_where_the_captioner_looked(browser: WebDriver, page: Path) -> None:
    assert words(browser) == [
        "a: looks most at the top left",
        "dog: looks most at the bottom right",
        "runs: looks all over the picture",
        "the end: looks most at the top",
    ]
    captions = [caption.text for caption in browser.find_elements(By.CSS_SELECTOR, "#cards .caption")]
    assert captions == ["a dog runs.", "a dog runs"]
    assert browser.get_log("browser") == []


def test_a_mouse_shows_words_and_a_click_keeps_one(browser: WebDriver, page: Path) -> None:
    first, second, *_ = browser.find_elements(By.CLASS_NAME, "word")
    assert shown(browser) is None
    ActionChains(browser).move_to_element(first).perform()
    assert shown(browser) == "a"
    ActionChains(browser).move_to_element(second).click().move_to_element(first).perform()
    assert shown(browser) == "a"
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert shown(browser) == "dog"
    assert second.get_attribute("aria-pressed") == "true"
    ActionChains(browser).move_to_element(second).click().perform()
    assert shown(browser) is None


def test_the_map_lies_where_the_look_was(browser: WebDriver, page: Path) -> None:
    first, second, everywhere, _ = browser.find_elements(By.CLASS_NAME, "word")
    first.click()
    covered = heat(browser)
    size = len(covered)
    assert np.unravel_index(covered.argmax(), covered.shape) < (size / 6, size / 6)
    assert covered[size // 2 :, size // 2 :].max() == 0
    second.click()
    covered = heat(browser)
    assert covered[size // 2 :, size // 2 :].max() > 150
    assert covered[: size // 2].max() == 0
    everywhere.click()
    assert np.ptp(heat(browser)) <= 1
    box = browser.execute_script(
        "return ['.picture', '.heat'].map(name => JSON.stringify(document.querySelector(name).getBoundingClientRect()))"
    )
    assert box[0] == box[1]


def test_the_keyboard_walks_through_the_words(browser: WebDriver, page: Path) -> None:
    browser.find_element(By.ID, "order").send_keys(Keys.TAB)
    seen = [shown(browser)]
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.END, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.HOME, Keys.ENTER):
        browser.switch_to.active_element.send_keys(key)
        seen.append(shown(browser))
    assert seen == ["a", "dog", "runs", ".", ".", "runs", "a", "a"]
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert shown(browser) == "a", "Enter kept it, and Tab leaves the caption"
    assert "word" not in (browser.switch_to.active_element.get_attribute("class") or "")
    browser.find_element(By.CLASS_NAME, "word").send_keys(Keys.ESCAPE)
    assert shown(browser) is None


def test_a_finger_shows_and_hides_on_a_phone(browser: WebDriver, page: Path) -> None:
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
            assert shown(browser) == expected
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_rows_of_the_best_and_the_worst_scroll_by_themselves(browser: WebDriver, tmp_path: Path) -> None:
    said = [Prediction(str(number), "a dog runs") for number in range(20)]
    marks = {one.image_id: {"shape": True, "colour": False} for one in said}
    cider = {one.image_id: float(number) for number, one in enumerate(said)}
    browser.get(Path(write_report(tmp_path / "report", "Captions", said, marks=marks, cider=cider)).as_uri())
    row = browser.find_element(By.ID, "best")
    assert browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", row)
    width, room = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width <= room
