"""The page without a mouse, for screen readers, and on a telephone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.running import RunningServer
from tests.test_layers import ROOT

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.server.page.browsing import Tab

ANSWER = [b"A **bold**", b" word.\n\n", b"```python\nx = 1  # a long line of code " + b"x" * 200,
          b"\n```\n\n", b"| a | b |\n|--|--|\n| 1 | 2 |\n\n",
          "\N{GRINNING FACE}".encode()[:2], "\N{GRINNING FACE}".encode()[2:], b" \n\t"]  # fmt: skip


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core, which .ci/run fetches from npm."""
    for folder in (ROOT / ".cache" / "axe", ROOT / "node_modules"):
        for path in folder.glob("**/axe.min.js"):
            return path.read_text("utf-8")
    pytest.skip("axe-core is absent; `npm install --prefix .cache/axe axe-core@4` brings it")


def findings(tab: Tab, axe: str) -> list[str]:
    """What axe finds serious or critical on the page as it is."""
    if not tab.page.evaluate("'axe' in window"):
        tab.page.evaluate(axe)
    found: list[dict[str, Any]] = tab.page.evaluate("axe.run().then((found) => found.violations)")
    return [
        f"{rule['id']}: {node['html']}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    open_tab: Callable[..., Tab], server: RunningServer, axe: str, scheme: str
) -> None:
    tab = open_tab(server.url, color_scheme=scheme, reduced_motion="reduce")
    found = findings(tab, axe)
    tab.reply_with(ANSWER)
    tab.ask("Hello")
    tab.page.click("[aria-label='Another answer']")
    tab.wait_until_done()
    found += findings(tab, axe)
    tab.page.click(".foot >> text=Inspect tokens")
    found += findings(tab, axe)
    tab.page.click(".token >> nth=1")
    found += findings(tab, axe)
    tab.page.keyboard.press("Escape")
    for opener in ("#open-settings", "#open-shortcuts"):
        tab.page.click(opener)
        found += findings(tab, axe)
        tab.page.keyboard.press("Escape")
    tab.page.click("[aria-label='Actions for Hello']")
    found += findings(tab, axe)
    tab.page.keyboard.press("Escape")
    tab.page.set_viewport_size({"width": 360, "height": 640})
    tab.page.click("#toggle-sidebar")
    assert found + findings(tab, axe) == []


def test_everything_by_keyboard_alone(tab: Tab) -> None:
    press = tab.page.keyboard.press
    tab.reply_with([b"one", b" two", b" three"])
    expect(tab.page.locator("#draft")).to_be_focused()
    tab.page.keyboard.type("Hello")
    press("Shift+Enter")
    tab.page.keyboard.type("there")
    press("Enter")
    tab.wait_until_done()
    expect(tab.page.locator(".user .body")).to_have_text("Hello\nthere", use_inner_text=True)
    press("Alt+i")
    reach(tab, ".token >> nth=0", "Shift+Tab")
    press("ArrowRight")
    press("End")
    expect(tab.page.locator(".token >> nth=2")).to_be_focused()
    press("ArrowLeft")
    press("Enter")
    expect(tab.page.locator("#considered button.row")).to_be_focused()
    press("Escape")
    expect(tab.page.locator(".token >> nth=1")).to_be_focused()
    press("Enter")
    press("Enter")  # branch here
    tab.wait_until_done()
    expect(tab.page.locator(".assistant .count")).to_have_text("2 / 2")
    press("Alt+r")
    tab.wait_until_done()
    expect(tab.page.locator(".assistant .count")).to_have_text("3 / 3")
    tab.page.focus("#draft")
    press("ArrowUp")
    expect(tab.page.locator(".user textarea")).to_be_focused()
    press("Escape")
    press("Alt+s")
    expect(tab.page.locator("#system")).to_be_focused()
    press("Escape")
    press("Alt+n")
    expect(tab.page.locator("#draft")).to_be_focused()
    press("Alt+k")
    expect(tab.page.locator("#search")).to_be_focused()
    reach(tab, ".entry", "Tab")
    press("Tab")
    press("Enter")
    expect(tab.page.locator("#menu button >> nth=0")).to_be_focused()
    press("ArrowDown")
    press("ArrowDown")
    press("Enter")
    expect(tab.page.locator("#confirm-delete")).to_be_visible()
    reach(tab, "#confirm-delete >> button:text-is('Delete')", "Tab")
    press("Enter")
    expect(tab.page.locator(".entry")).to_have_count(0)
    press("Alt+/")
    expect(tab.page.locator("#shortcuts")).to_be_visible()


def reach(tab: Tab, selector: str, key: str) -> None:
    """Press a key until an element has the focus, and see that the focus can be seen."""
    target = tab.page.locator(selector)
    for _ in range(30):
        if target.evaluate("node => node === document.activeElement"):
            assert target.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
            return
        tab.page.keyboard.press(key)
    raise AssertionError(f"{selector} is out of reach")


def test_a_screen_reader_hears_each_block_once(tab: Tab) -> None:
    tab.page.evaluate(
        """() => {
          window.heard = [];
          new MutationObserver((records) => {
            for (const { addedNodes } of records)
              for (const node of addedNodes) heard.push(node.textContent);
          }).observe(document.getElementById("announcer"), { childList: true });
        }"""
    )
    words = [b"First paragraph.\n\n", b"Second", b" one", b" here."]
    tab.reply_with(words)
    tab.ask("Hello")
    expect(tab.page.locator("#announcer p")).to_have_count(3)
    heard = tab.page.evaluate("heard")
    assert heard == ["First paragraph.", "Second one here.", "Answer complete."]
    assert tab.page.locator("#messages[aria-live], #messages [aria-live]").count() == 0


@pytest.mark.parametrize("width", [360, 320])
def test_a_narrow_screen_has_no_horizontal_scroll(
    open_tab: Callable[..., Tab], server: RunningServer, width: int
) -> None:
    tab = open_tab(server.url, viewport={"width": width, "height": 640}, has_touch=True)

    def check() -> None:
        sizes = "(node) => [node.scrollWidth, node.clientWidth]"
        assert tab.page.locator("html").evaluate(sizes)[0] <= width
        wide, room = tab.page.locator("#scroller").evaluate(sizes)
        assert wide <= room

    check()
    tab.reply_with([*ANSWER, b"\n" + b"w" * 300])
    tab.ask("q" * 300)
    check()
    tab.page.click(".foot >> text=Inspect tokens")
    check()
    tab.page.click(".token >> nth=0")
    box = tab.page.locator("#considered").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
    tab.page.keyboard.press("Escape")
    tab.page.click("#open-settings")
    box = tab.page.locator("#settings").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
    tab.page.click("#settings >> text=Cancel")
    tab.page.click("#toggle-sidebar")
    expect(tab.page.locator("#new")).to_be_focused()
    check()
    tab.page.click("#new")
    expect(tab.page.locator("#sidebar")).to_be_hidden()
