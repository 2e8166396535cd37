from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from captionlib.data.shards.inspection import FailureExample, FailureReport
from captionlib.evaluation.comparison import ComparedScore, Comparison
from captionlib.evaluation.image_display import ImageDisplay
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
            display=ImageDisplay(attention_maps={"x": MAPS}),
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


@pytest.fixture
def comparison(tmp_path: Path, browser: WebDriver) -> Path:
    """Opens a comparison of 20 images. A is better for the first ten, and B for the others."""
    predictions = [Prediction(str(n), f"a dog runs {n}", references=("A dog.",)) for n in range(20)]
    scores = [ComparedScore("CIDEr", 1.5, 1.25, 0.1, 0.4), ComparedScore("mean length", 3.0, 2.0, 0.5, 1.5)]
    compared = Comparison(
        names=("beam", "greedy"),
        predictions=predictions,
        baseline={each.image_id: replace(each, caption="a cat") for each in predictions},
        scores=scores,
        cider={str(n): 1.0 + (n < 10) for n in range(20)},
        baseline_cider={str(n): 1.5 for n in range(20)},
        not_compared=(0, 0),
        notes=[],
    )
    failures = {"NotFound": FailureReport(3, [FailureExample("x", "x.jpg", "no file")])}
    path = write_report(
        tmp_path / "report",
        "Captions",
        predictions,
        cider=compared.cider,
        comparison=compared,
        failures=failures,
        history=[{"epoch": epoch, "loss": 2.0 / epoch, "perplexity": 9.0 / epoch} for epoch in (1, 2)],
    )
    browser.get(Path(path).as_uri())
    return Path(path)


def list_ids(browser: WebDriver, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0] + ' .meta')].map(each => each.textContent)"
    return [str(each) for each in browser.execute_script(script, selector)]


def test_comparison_shows_the_largest_differences_and_filters_by_the_better_caption(
    browser: WebDriver, comparison: Path
) -> None:
    assert list_ids(browser, "#best") == [str(n) for n in range(10)]
    assert sorted(map(int, list_ids(browser, "#worst"))) == list(range(10, 20))
    choose = "arguments[0].value = 'b'; arguments[0].dispatchEvent(new Event('input'))"
    browser.execute_script(choose, browser.find_element(By.ID, "winner"))
    assert list_ids(browser, "#cards") == [str(n) for n in range(10, 20)]
    browser.find_element(By.ID, "words").send_keys("runs")
    assert browser.find_element(By.ID, "count").text == "10 of 20 images"
    marked = browser.find_elements(By.CSS_SELECTOR, "#cards mark")
    assert {each.text for each in marked} == {"runs"}
    browser.refresh()
    assert browser.find_element(By.ID, "count").text == "10 of 20 images", "the address keeps the filter"
    browser.find_element(By.ID, "words").send_keys("zebra")
    browser.find_element(By.ID, "clear").click()
    assert browser.find_element(By.ID, "count").text == "20 images"


@pytest.mark.parametrize("width", [390, 700, 1200])
def test_strips_show_whole_cards(browser: WebDriver, comparison: Path, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        cut = browser.execute_script(
            "const strip = document.getElementById('best'), edge = strip.getBoundingClientRect().right;"
            "return [...strip.children].map(card => card.getBoundingClientRect())"
            ".filter(card => card.left < edge - 1 && card.right > edge + 1).length"
        )
        assert cut == 0
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["page", "comparison"])
def test_report_is_accessible(kind: str, browser: WebDriver, scheme: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kind)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert find_violations(browser) == []
