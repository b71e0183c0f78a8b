"""Pictures of the page in docs/, with the demo model's answers: LLAMA3_SCREENSHOTS=1 makes them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama import Llama
from tests.server.running import RunningServer
from tests.test_layers import ROOT

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.server.page.browsing import Tab

LARGEST = 150_000  # bytes of a picture
WIDE = {"width": 1160, "height": 760}
PICTURES = ("light", "dark", "inspect", "phone")


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_the_documentation_are_small(name: str) -> None:
    assert (ROOT / "docs" / f"server-page-{name}.png").stat().st_size < LARGEST


@pytest.mark.skipif(not os.environ.get("LLAMA3_SCREENSHOTS"), reason="LLAMA3_SCREENSHOTS=1 runs it")
def test_take_pictures(
    open_tab: Callable[..., Tab],
    start_server: Callable[..., RunningServer],
    demo_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.server.running.NAME", "SmolLM2-135M-Instruct")

    def build() -> Llama:
        tokenizer = demo_dir / "tokenizer.model"
        return Llama.build(demo_dir, tokenizer, 2048, 2, device="cpu", dtype=torch.float32)

    tab = open_tab(start_server(build).wait_until_ready().url, viewport=WIDE, color_scheme="light")
    for question in ("Why is the sky blue?", "Name three good books."):
        tab.page.click("#new")
        tab.configure(temperature=0, max_tokens=40)
        tab.ask(question)
    tab.page.click("#new")
    tab.configure(temperature=0, max_tokens=230)
    tab.ask("Write a Python function that reverses a string. Explain it in three short points.")
    tab.page.mouse.move(0, 0)
    take(tab, "light")
    tab.page.emulate_media(color_scheme="dark")
    take(tab, "dark")
    tab.page.emulate_media(color_scheme="light")
    tab.page.set_viewport_size({"width": 360, "height": 740})
    tab.page.evaluate("document.getElementById('scroller').scrollTop = 0")
    take(tab, "phone")
    tab.page.set_viewport_size(WIDE)  # type: ignore[arg-type]
    tab.page.click("#new")
    tab.configure(temperature=0.9, seed=1, max_tokens=80)
    tab.ask("Tell me about llamas in two sentences.")
    tab.page.click(".foot >> text=Inspect tokens")
    tab.page.locator(".token:is(.s2, .s3)").nth(3).click()
    tab.page.click("button.row >> nth=1")
    tab.wait_until_done()
    tab.page.locator(".token:is(.s2, .s3)").nth(8).click()
    take(tab, "inspect")


def take(tab: Tab, name: str) -> None:
    """Save a picture with 256 colours: screens of text need no more."""
    from PIL import Image

    expect(tab.page.locator("#toast")).to_be_hidden()
    tab.page.wait_for_timeout(400)
    picture = Image.open(io.BytesIO(tab.page.screenshot())).convert("RGB")
    small = picture.quantize(256, dither=Image.Dither.NONE)
    small.save(ROOT / "docs" / f"server-page-{name}.png", optimize=True)
