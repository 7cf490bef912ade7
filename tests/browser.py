"""A headless Chromium, driven by selenium, that can reach no network."""

import base64
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    '--headless',
    '--no-sandbox',  # it will not start as root with one
    '--disable-gpu',
    '--disable-quic',
    '--disable-dev-shm-usage',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost',
)


@contextmanager
def open_browser(profile: Path):
    """A browser with an empty profile; the test skips where none is installed."""
    chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if chromium is None or driver is None:
        pytest.skip('no chromium and chromedriver: `make browser` installs them on Debian, as root')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f'--user-data-dir={profile}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def look_at(browser, path: Path, width: int) -> bytes:
    """Open a file in a window of so many pixels, as a phone shows it if that is few; a PNG of the whole page."""
    screen = {'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': width < 600}
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', screen)
    browser.get(path.resolve().as_uri())
    height = browser.execute_script('return document.documentElement.scrollHeight')
    clip = {'x': 0, 'y': 0, 'width': width, 'height': height, 'scale': 1}
    shot = browser.execute_cdp_cmd('Page.captureScreenshot', {'captureBeyondViewport': True, 'clip': clip})
    return base64.b64decode(shot['data'])
