"""Chromium for the tests of the chat page, skipped with the reason where it is absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.running import RunningServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.server.page.browsing import Tab

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium, for one file: tests of other files may not run in playwright's loop."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium here; `apt-get install chromium` brings one")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Opens the page of a server: `open_tab(url, **options of the context)`.

    At the end nothing may have gone wrong in it: see `Tab.problems`.
    """
    from tests.server.page.browsing import Tab

    tabs: list[Tab] = []

    def open_one(url: str, **options: Any) -> Tab:
        tabs.append(Tab(browser, url, **options))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        tab.context.close()
    assert [problem for tab in tabs for problem in tab.problems] == []


@pytest.fixture
def tab(open_tab: Callable[..., Tab], server: RunningServer) -> Tab:
    """The page of the tiny model's server."""
    return open_tab(server.url)
