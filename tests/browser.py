"""Chromium without a screen, for the tests of pages."""

import shutil
import time

import pytest


def start_browser(profile):
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="the page's tests need: pip install selenium"
    )
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(
            "the page's tests need chromium and chromedriver: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync disable-dev-shm-usage window-size=1280,900"
    for flag in [*flags.split(), f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": f"{profile}/downloads"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def wait(browser, script):
    end = time.monotonic() + 15
    while not (value := browser.execute_script("return " + script)):
        assert time.monotonic() < end, script
        time.sleep(0.02)
    return value
