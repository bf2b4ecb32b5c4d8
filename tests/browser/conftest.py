"""A real Chromium, driven by Playwright's Python package; tests skip with the reason where one of them is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.synthetic import synthetic_pairs, write_dataset

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAIRS, DROPS = 120, 20


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """A headless browser for one test module: Playwright's event loop must not outlive it."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pairs():
    """The pairs of `folder`: a few strange and harmful ones, then ordinary ones."""
    return synthetic_pairs(PAIRS, characters=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pairs) -> Path:
    """A dataset folder with these pairs and some dropped rows."""
    return write_dataset(tmp_path_factory.mktemp("browser") / "pairs", pairs, DROPS)


@pytest.fixture(scope="module")
def file(folder) -> Path:
    """The page of `folder`."""
    from clair.reporting.dataset_report import report

    return report(folder)


@pytest.fixture
def tab(chromium):
    """Open a page file in a new window. Afterwards the page may have logged, requested and loaded nothing."""
    contexts, wrong = [], []

    def open(file: Path, anchor: str = "", **options):
        context = chromium.new_context(viewport={"width": 1400, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.wrong = wrong
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url == file.as_uri() or wrong.append(f"request: {request.url}"))
        page.goto(file.as_uri() + anchor.replace(file.as_uri(), ""))
        page.wait_for_selector("html[data-ready]")
        return page

    yield open
    for context in contexts:
        context.close()
    assert not wrong


FONTS = ("", "monospace", "1.25rem monospace")
"""Replacements of a page's fonts: machines have other ones, wider than those that a page was made with."""


def too_wide(page, width: int) -> dict[str, int]:
    """By font, how many pixels the page is wider than a window of `width`; empty where none is."""
    page.set_viewport_size({"width": width, "height": 800})
    measure = """font => {
      document.documentElement.style.font = font.includes("rem") ? font : "";
      document.documentElement.style.fontFamily = font.split(" ").pop();
      return document.documentElement.scrollWidth - innerWidth;
    }"""
    excess = {font: page.evaluate(measure, font) for font in FONTS}
    return {font: pixels for font, pixels in excess.items() if pixels > 0}


def visit(page, view: str) -> None:
    """Go to a part of the page by its link."""
    page.click(f"nav a[href='#{view}']")
    page.wait_for_selector(f"nav a[href='#{view}'][aria-current]")
