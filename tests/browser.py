"""A headless Chromium for the tests of pages, which are skipped where it is not installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.remote.webdriver import WebDriver

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver: apt install chromium-driver"
)


@contextmanager
def open_browser(profile: Path) -> Iterator[WebDriver]:
    """Opens a browser for the duration of the block; the profile folder must be new."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"]
    # Without a display there is no mouse, so the media features `hover` and `pointer` would be those of a phone.
    mouse = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
    arguments.append(f"--blink-settings={mouse}")
    # The browser must open only the connections that the tests need.
    arguments += ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    for argument in [*arguments, "--no-first-run", f"--user-data-dir={profile}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def find_violations(browser: WebDriver) -> list[tuple[str, str]]:
    """Returns the rules of axe that the page violates, and an element for each."""
    browser.execute_script((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    result = browser.execute_async_script("axe.run().then(arguments[0])")
    return [(rule["id"], rule["nodes"][0]["html"]) for rule in result["violations"]]
