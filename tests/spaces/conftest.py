"""Headless Chromium for the pages."""

from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium: apt-get install chromium fonts-dejavu-core")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def watch():
    """A tab and its address -> lists that fill with console errors and requests to other hosts."""

    def watching(tab, url):
        errors, strangers = [], []
        tab.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        local = (url, "data:", "blob:")
        tab.on("request", lambda r: None if r.url.startswith(local) else strangers.append(r.url))
        return errors, strangers

    return watching
