"""The page in Chromium, from a file: no error, no request, its numbers, its controls."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.explain.trace import Trace
from tests.explain.test_page_data import HOSTILE, tiny, trace
from tests.server.page.conftest import browser
from tests.server.page.test_access import axe
from tests.test_layers import ROOT

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.server.page.browsing import REPORT_VIOLATIONS

__all__ = ["axe", "browser", "tiny", "trace"]
Opener = Callable[..., Page]
WIDE = {"width": 1160, "height": 820}
PICTURES = ("light", "dark")
LARGEST = 200_000  # bytes of a picture


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Opener]:
    """Opens the page of a trace from a file; at the end nothing may have gone wrong in it."""
    problems: list[str] = []
    contexts: list[BrowserContext] = []

    def asked(url: str, own: str) -> None:
        if url != own:
            problems.append(f"request: {url}")

    def opened(trace: Trace, **options: Any) -> Page:
        path = trace.save(tmp_path / f"{len(contexts)}.html")
        context = browser.new_context(**options)
        contexts.append(context)
        context.add_init_script(REPORT_VIOLATIONS)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("request", lambda request: asked(request.url, path.as_uri()))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def test_a_page_draws_everything_and_asks_for_nothing(open_page: Opener, trace: Trace) -> None:
    page = open_page(trace)
    for name in ("tokens", "shapes", "parts", "rope", "cache", "attention", "lens", "next"):
        assert page.locator(f"#{name}-figure > *").count() > 0
    assert page.locator("#tokens-figure [role=option]").count() == len(trace.ids)
    assert page.locator(".stage").count() == len(trace.stages)
    expect(page.locator("#bounded")).to_be_hidden()
    assert page.title().startswith("llama3 explain: ") and "Hello" in page.title()
    figure = page.locator("#parts-figure")
    for label, key in (
        ("Bytes", "bytes"),
        ("Operations", "operations"),
        ("Parameters", "parameters"),
    ):
        figure.get_by_text(label, exact=True).click()
        total = sum(getattr(stage, key) for stage in trace.stages)
        expect(figure.locator(".readout")).to_contain_text(f"Together {total:,}")


def test_a_hostile_prompt_shows_as_text(open_page: Opener, tiny: Llama) -> None:
    page = open_page(tiny.explain(HOSTILE))
    texts = page.locator(".chip bdi").all_text_contents()[1:]
    assert "".join(texts[:9]) == "</script>" and page.locator("img").count() == 0
    assert "⟨U+0000⟩" in texts and "⟨U+001B⟩" in texts and "⟨F0⟩" in texts  # a byte each
    assert "␣" in texts and "<" in texts


def test_numbers_of_a_token(open_page: Opener, trace: Trace) -> None:
    page = open_page(trace)
    page.locator(".chip").nth(3).click()
    facts = page.locator("#tokens-figure .pairs").inner_text()
    bits = float(trace.surprise[3])
    assert f"{bits:.2f} bits" in facts and f"{trace.ids[3]}" in facts
    page.keyboard.press("ArrowRight")
    expect(page.locator(".chip[aria-selected=true]")).to_have_attribute("tabindex", "0")
    assert (
        f"{float(trace.surprise[4]):.2f} bits" in page.locator("#tokens-figure .pairs").inner_text()
    )
    page.keyboard.press("Home")
    assert "nothing predicts" in page.locator("#tokens-figure .pairs").inner_text()


def shown_weight(page: Page) -> float:
    """The number of the readout of attention, from 0 to 1."""
    words = page.locator("#attention-readout").inner_text()
    return float(words.partition("reads ")[2].partition(" %")[0].lstrip("< ")) / 100


def test_choosing_a_layer_and_a_head(open_page: Opener, trace: Trace) -> None:
    page = open_page(trace)
    canvas = page.locator("#attention-figure canvas.big")
    T = len(trace.ids)
    for layer, head in ((0, 0), (1, 3), (0, 2)):
        page.select_option("#layer", label=str(layer))
        page.locator(".head").nth(head).click()
        expect(page.locator(".head").nth(head)).to_have_attribute("aria-checked", "true")
        canvas.focus()
        page.keyboard.press("Home")
        assert shown_weight(page) == pytest.approx(
            float(trace.attention[layer, head, T - 1, 0]), abs=6e-4
        )
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowUp")
        assert shown_weight(page) == pytest.approx(
            float(trace.attention[layer, head, T - 2, 1]), abs=6e-4
        )
        page.keyboard.press("ArrowDown")
    assert page.locator(".group").count() == 2  # KV heads, two query heads each
    assert page.locator(".group").nth(1).locator(".head").count() == 2
    page.locator(".head").nth(2).focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".head").nth(3)).to_be_focused()
    expect(page.locator(".head").nth(3)).to_have_attribute("aria-label", "Head 3, KV head 1")


def test_hovering_over_attention(open_page: Opener, trace: Trace) -> None:
    page = open_page(trace, viewport=WIDE)
    page.select_option("#layer", label="1")
    canvas = page.locator("#attention-figure canvas.big")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    T, last = len(trace.ids), float(trace.attention[1, 0, -1, -1])
    page.mouse.move(box["x"] + box["width"] - 8, box["y"] + box["height"] - 8)
    expect(page.locator("#attention-readout")).to_contain_text(f"from position {T - 1}")
    assert shown_weight(page) == pytest.approx(last, abs=6e-4)


def test_the_lens_and_the_next_token(open_page: Opener, trace: Trace) -> None:
    page = open_page(trace)
    cells = page.locator(".lens tbody tr")
    assert cells.count() == 3
    cells.nth(1).locator("td").nth(2).click()
    shares = page.locator("#lens-figure .bar > :last-child").all_inner_texts()
    assert [float(s.removesuffix(" %")) / 100 for s in shares] == pytest.approx(
        trace.lens_probs[1, 2].tolist(), rel=0.02, abs=1e-4
    )
    page.keyboard.press("ArrowDown")
    expect(page.locator(".lens td[aria-selected=true]")).to_be_focused()
    rows = page.locator(".next tbody tr")
    cut = int((trace.next.final == 0)[trace.next.raw.topk(40).indices].sum())
    assert rows.count() == 40 and page.locator(".next .gone").count() == cut
    first = rows.first.locator("td.number").all_inner_texts()
    probs = [float(p.max()) for p in (trace.next.raw, trace.next.tempered, trace.next.final)]
    assert [float(t.removesuffix(" %")) / 100 for t in first] == pytest.approx(probs, abs=6e-4)


def test_a_bounded_prompt_and_one_token(open_page: Opener, tiny: Llama) -> None:
    page = open_page(tiny.explain("A prompt with more tokens", max_tokens=6))
    expect(page.locator("#bounded")).to_contain_text(
        "The prompt has 26 tokens. These are the first 6"
    )
    expect(page.locator("#bounded")).to_contain_text("Raise max_tokens to see more.")
    page = open_page(tiny.explain(""))
    assert page.locator(".chip").count() == 1 and shown_weight(page) == 1


def test_a_cold_draw_after_many_tokens(open_page: Opener, tiny: Llama) -> None:
    """More tokens than are listed; probabilities that a low temperature makes zero."""
    ids = [*range(3, 503), 72, 105]
    tiny.model.unused = torch.tensor([int(tiny.explain(ids, max_tokens=512).logits[-1].argmax())])
    try:
        trace = tiny.explain(ids, temperature=0.001, max_tokens=512)
    finally:
        tiny.model.unused = None
    page = open_page(trace)
    last = trace.pieces[-1].decode()
    expect(page.locator(".next caption bdi")).to_have_text(last)
    words = page.locator(".next .cut").all_inner_texts()
    assert "no chance at this temperature" in words and "unused id" not in words


def test_a_telephone(open_page: Opener, trace: Trace) -> None:
    page = open_page(trace, viewport={"width": 360, "height": 640}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 900, "height": 640})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 900


def test_the_theme(open_page: Opener, trace: Trace) -> None:
    page = open_page(trace, color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != dark
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    assert page.evaluate(colour) == dark


def test_axe_finds_nothing_serious(open_page: Opener, trace: Trace, axe: str) -> None:
    page = open_page(trace, color_scheme="light", bypass_csp=True)
    page.evaluate(axe)
    page.click("summary")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found: list[dict[str, Any]] = page.evaluate("axe.run().then((found) => found.violations)")
        serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
        assert [f"{rule['id']}: {node['html']}" for rule in serious for node in rule["nodes"]] == []


def test_in_a_notebook(browser: Browser, trace: Trace) -> None:
    """In a frame of its own: the notebook's style and scripts are not those of the page."""
    page = browser.new_page()
    page.set_content(f"<h2 id=mine>Notebook</h2>{trace._repr_html_()}<h2>After</h2>")
    frame = page.frame_locator("iframe")
    expect(frame.locator(".chip")).to_have_count(len(trace.ids))
    font = "getComputedStyle(document.getElementById('mine')).fontSize"
    assert page.evaluate(font) == "24px"
    assert page.evaluate("document.querySelector('iframe').contentDocument") is None
    page.close()


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_the_documentation_are_small(name: str) -> None:
    assert (ROOT / "docs" / f"explain-{name}.png").stat().st_size < LARGEST


@pytest.mark.skipif(not os.environ.get("LLAMA3_SCREENSHOTS"), reason="LLAMA3_SCREENSHOTS=1 runs it")
def test_take_pictures(open_page: Opener, demo_dir: Path) -> None:
    from PIL import Image

    with Llama.build(demo_dir, None, 256, 1, device="cpu", dtype=torch.bfloat16) as llama:
        trace = llama.explain(
            "The capital of France is Paris, and the capital of Italy is", name="the demo model"
        )
    for name, section in (("light", "header"), ("dark", "#attention")):
        page = open_page(trace, viewport=WIDE, color_scheme=name, reduced_motion="reduce")
        page.locator(".head").nth(3).click()
        page.mouse.move(0, 0)
        page.evaluate(f"document.querySelector('{section}').scrollIntoView()")
        page.wait_for_timeout(300)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.save(ROOT / "docs" / f"explain-{name}.png", optimize=True)
