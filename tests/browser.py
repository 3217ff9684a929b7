"""Headless Chromium for the tests of pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

# Software WebGL: the same pixels with and without a GPU.
_OPTIONS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--force-color-profile=srgb"]


@contextmanager
def chromium() -> Iterator:
    """Start the Chromium that is installed; skip the test with the reason where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on PATH (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=_OPTIONS)
        yield browser
        browser.close()


@contextmanager
def open_page(browser) -> Iterator:
    """Open a page of 1000 x 900 pixels without network: it reaches files and servers of this machine alone.

    Afterwards, an error on its console, an exception or a request elsewhere fails the test.
    """
    faults: list[str] = []

    def decide(route) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("file", "data", "blob") or address.hostname in ("127.0.0.1", "localhost"):
            route.continue_()
        else:
            faults.append(f"request: {route.request.url}")
            route.abort()

    context = browser.new_context(viewport={"width": 1000, "height": 900})
    context.route("**/*", decide)
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(f"exception: {error}"))
    page.on("console", lambda line: faults.append(f"{line.type}: {line.text}") if line.type == "error" else None)
    yield page
    context.close()
    assert not faults, "\n".join(faults)
