"""The page in Chromium: digits, long prompts, narrow windows, and boxes that have more."""

from __future__ import annotations

import math
import re

import pytest

from llama import Llama
from llama.explain.trace import Trace
from tests.explain.test_page_data import large, tiny, trace

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.explain.test_page import Opener, browser, open_page

__all__ = ["browser", "open_page", "tiny", "trace"]
IDS = [1 + i * 7 % 250 for i in range(200)]


def percent(p: float) -> str:
    """As the page writes it."""
    if p >= 0.9995:
        return "100 %"
    if p >= 0.0001:
        return f"{100 * p:.{1 if p >= 0.1 else 2}f} %"
    return "< 0.01 %" if p > 0 else "0 %"


def test_the_digits_are_those_of_the_trace(open_page: Opener, tiny: Llama) -> None:
    """Not rounded twice."""
    trace = tiny.explain(IDS, temperature=0.7)
    page = open_page(trace)
    page.click("summary")
    rows = page.locator("details tbody tr").all()
    cells = [row.locator("td").all_inner_texts() for row in rows[1:]]
    logprobs = trace.logprobs[1:].tolist()
    assert [row[4] for row in cells] == [f"{x:.3f}" for x in logprobs]
    assert [row[5] for row in cells] == [f"{-x / math.log(2):.2f}" for x in logprobs]
    texts = page.locator(".next tbody tr").all_inner_texts()
    found = [re.findall(r"(?:< )?[\d.]+ %", text)[:2] for text in texts]
    top = trace.next.raw.topk(40).indices
    steps = zip(trace.next.raw[top].tolist(), trace.next.tempered[top].tolist(), strict=True)
    assert found == [[percent(raw), percent(tempered)] for raw, tempered in steps]


def test_a_token_that_is_not_in_the_maps(open_page: Opener, tiny: Llama) -> None:
    trace = tiny.explain(IDS)
    page = open_page(trace)
    expect(page.locator("#attention-readout")).to_contain_text("Position 95 ")
    expect(page.locator("#lens-figure h3")).to_contain_text("at position 95 ")
    page.locator(".chip").nth(150).click()
    words = "Position 150 is not in this map, which has the first 96."
    expect(page.locator("#attention-readout")).to_have_text(words)
    expect(page.locator("#lens-figure h3")).to_have_text(words)
    assert page.locator("#attention-figure .bar, #lens-figure .bar").count() == 0
    assert page.locator(".lens td[aria-selected=true]").count() == 0
    rope = page.locator("#rope-figure > .readout")
    expect(rope).to_contain_text("Pair 0 at position 150: 150.0 rad")
    expect(rope).to_contain_text("This position is not in the map, which has the first 96.")
    page.locator("#attention-figure canvas.big").focus()
    page.keyboard.press("ArrowUp")
    expect(page.locator("#attention-readout")).to_contain_text("Position 95 ")
    expect(rope).to_contain_text("at position 95: 95.00 rad")
    expect(page.locator("#notes")).to_contain_text("attention and the lens of the first 96")


def test_weights_of_one_byte_have_one_decimal(open_page: Opener, trace: Trace) -> None:
    page = open_page(large(trace, 32, 32, 60))
    assert re.search(r"reads 1\.6 % from", page.locator("#attention-readout").inner_text())
    notes = page.locator("#notes").inner_text()
    shown = page.locator("#layer option").count()
    assert shown < 32 and re.search(r"attention in (layers [\d, ]+ only|all layers except)", notes)
    expect(page.locator("#attention-figure")).to_contain_text(f"{shown} of 32 layers are on this")


@pytest.mark.parametrize("width", [768, 800, 830, 1000])
def test_nothing_is_wider_than_the_window(open_page: Opener, trace: Trace, width: int) -> None:
    page = open_page(trace, viewport={"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_prompt_the_checkpoint_and_the_settings(open_page: Opener, tiny: Llama) -> None:
    text = "two\nlines <b> and \x1b"
    page = open_page(tiny.explain(text, 0.8, 0.9, 40, min_p=0.01, name="a/model"))
    assert page.locator("#prompt").inner_text() == "two\nlines <b> and ⟨U+001B⟩"
    expect(page.locator("#model")).to_have_text("Checkpoint: a/model")
    settings = "Settings: temperature 0.8, top-k 40, min-p 0.01, top-p 0.9."
    expect(page.locator("#sampling")).to_have_text(settings)
    expect(page.locator("#next-figure .readout")).to_contain_text("top-k 40 and min-p 0.01: ")


@pytest.mark.parametrize("tokens", [12, 96])
def test_small_maps_are_empty_above_the_diagonal(
    open_page: Opener, tiny: Llama, tokens: int
) -> None:
    page = open_page(tiny.explain(IDS[:tokens]))
    canvas = page.locator(".head canvas").first
    side, row = canvas.evaluate(
        "c => [c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.width).data]]"
    )
    assert side == (12 if tokens == 12 else 48)
    filled = [row[4 * i + 3] > 0 for i in range(side * side)]
    assert not any(filled[y * side + x] for y in range(side) for x in range(y + 1, side))
    assert all(filled[y * side + y] for y in range(side))
    assert canvas.evaluate("c => getComputedStyle(c).imageRendering") == "pixelated"


def test_boxes_show_that_they_have_more(open_page: Opener, tiny: Llama) -> None:
    page = open_page(tiny.explain(IDS), viewport={"width": 360, "height": 640})
    assert page.locator("nav .beyond").count() == 1
    box = page.locator("#next-figure .scroll")
    expect(box).to_have_class(re.compile("below"))
    box.evaluate("box => box.scrollTo(0, box.scrollHeight)")
    expect(box).not_to_have_class(re.compile("below"))
    lens = page.locator("#lens-scroll")
    expect(lens).to_have_class(re.compile("beyond"))
    assert lens.evaluate("box => [box.scrollTop, box.scrollLeft]") == [0, 0]
