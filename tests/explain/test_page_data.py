"""What a page holds: the trace's numbers, its policy, and never more than 2 MB."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.explain.page import assets
from llama.explain.trace import Trace, check_output
from llama.model import ModelArgs
from tests.test_layers import ROOT

LIMIT = 2_000_000
HOSTILE = "</script><img src=x onerror=alert(1)><!-- &lt; \" ' "
HOSTILE += "\u2028 \u202e\x00\x1b[31m \N{GRINNING FACE}"


@pytest.fixture(scope="module")
def tiny(folder: Path, byte_tokenizer_path: Path) -> Iterator[Llama]:
    with Llama.build(folder, byte_tokenizer_path, 512, 1, device="cpu", dtype="fp32") as llama:
        yield llama


@pytest.fixture(scope="module")
def trace(tiny: Llama) -> Trace:
    return tiny.explain("Hello, page", temperature=0.8, top_k=40)


def data_of(page: str) -> dict[str, Any]:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data: dict[str, Any] = json.loads(text)
    return data


def attention_of(data: dict[str, Any], heads: int) -> torch.Tensor:
    """(layers, heads, tokens, tokens), as the page's script reads them."""
    found, T = data["attention"], data["attention"]["tokens"]
    dtype = torch.uint8 if found["width"] == 1 else torch.uint16
    codes = torch.frombuffer(bytearray(base64.b64decode(found["data"])), dtype=dtype).float()
    maps = torch.zeros(len(found["layers"]), heads, T, T)
    rows = [(q, k) for q in range(T) for k in range(q + 1)]
    flat = codes.view(len(found["layers"]), heads, -1) / (2 ** (8 * found["width"]) - 1)
    for i, (q, k) in enumerate(rows):
        maps[:, :, q, k] = flat[:, :, i]
    return maps


def test_the_numbers_are_those_of_the_trace(trace: Trace) -> None:
    data = data_of(trace.to_html())
    assert data["ids"] == trace.ids
    assert [bytes.fromhex(data["texts"][str(i)]) for i in trace.ids] == trace.pieces
    assert data["logprobs"][0] is None
    assert data["logprobs"][1:] == pytest.approx(trace.logprobs[1:].tolist(), rel=1e-8)
    assert data["rope"]["frequencies"] == pytest.approx(trace.frequencies.tolist(), rel=1e-6)
    assert [tuple(stage[2]) for stage in data["stages"]] == [s.shape for s in trace.stages]
    sums = [sum(stage[i] for stage in data["stages"]) for i in (4, 5, 6)]
    assert sums == [
        sum(getattr(s, key) for s in trace.stages) for key in ("parameters", "bytes", "operations")
    ]
    assert data["lens"]["ids"] == trace.lens_ids.flatten().tolist()
    assert data["lens"]["probs"] == pytest.approx(trace.lens_probs.flatten().tolist(), rel=1e-5)
    for token, *steps in data["next"]["rows"]:
        found = trace.next
        probs = [float(p[token]) for p in (found.raw, found.tempered, found.limited, found.final)]
        assert steps == pytest.approx(probs, rel=1e-8)
    assert data["next"]["left"][-1] == int((trace.next.final > 0).sum())
    maps = attention_of(data, 4)
    assert data["attention"]["layers"] == [0, 1] and data["attention"]["width"] == 2
    assert (maps - trace.attention).abs().max() <= 1 / 131070 + 1e-7


def test_a_hostile_prompt_is_data(tiny: Llama) -> None:
    page = tiny.explain(HOSTILE).to_html()
    assert page.count("</script>") == 2 and "<img" not in page
    data = data_of(page)
    assert data["prompt"] == HOSTILE
    pieces = [bytes.fromhex(data["texts"][str(i)]) for i in data["ids"][1:]]
    assert b"".join(pieces).decode() == HOSTILE


def test_the_policy_allows_the_page_only(trace: Trace) -> None:
    page = trace.to_html()
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for kind, tag in (("style", "<style>"), ("script", '<script type="module">')):
        text = page.partition(tag)[2].partition(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page and "$" not in assets()[2].template.replace(
        "$policy", ""
    ).replace("$style", "").replace("$script", "").replace("$data", "")


def large(trace: Trace, layers: int, heads: int, tokens: int) -> Trace:
    """A trace as of a large model and a long prompt, whose tensors repeat a few numbers."""
    ids = [i % 512 for i in range(tokens)]
    weights = torch.ones(tokens, tokens).tril()
    args = ModelArgs(dim=64 * heads, n_layers=layers, n_heads=heads, vocab_size=512)
    lens = torch.randint(0, 128_000, (layers + 1, tokens, 5))
    return dataclasses.replace(
        trace,
        ids=ids,
        pieces=[b"x" * 200] * tokens,
        special=[False] * tokens,
        decode=lambda ids: b"y" * (200 if tokens > 40 else 10),
        args=args,
        attention=(weights / weights.sum(-1, keepdim=True)).expand(layers, heads, -1, -1),
        lens_ids=lens,
        lens_probs=torch.rand(layers + 1, tokens, 5),
        logprobs=torch.rand(tokens),
    )


@pytest.mark.parametrize(
    ("layers", "heads", "tokens"), [(32, 32, 40), (80, 64, 300), (126, 128, 180), (2, 2, 2000)]
)
def test_a_page_is_below_two_megabytes(trace: Trace, layers: int, heads: int, tokens: int) -> None:
    found = large(trace, layers, heads, tokens)
    page = found.to_html()
    assert len(page.encode()) < LIMIT
    data = data_of(page)
    shown = data["attention"]["tokens"]
    assert data["lens"]["tokens"] == shown  # the first ones, as in the maps
    assert data["lens"]["ids"] == found.lens_ids[:, :shown].flatten().tolist()
    maps = attention_of(data, heads)
    assert maps.sum(-1).sub(1).abs().max() < shown / 2 / 255  # whole rows, rounded
    assert len(data["attention"]["layers"]) >= min(4, layers)
    assert {0, layers - 1} <= set(data["attention"]["layers"])
    if (layers, heads) == (32, 32):  # Llama 3 8B, a prompt of 40 tokens: nothing is left out
        assert len(data["attention"]["layers"]) == 32 and shown == 40


def test_the_token_before_the_next_is_known(trace: Trace) -> None:
    """Also if it is not among those that are listed."""
    found = large(trace, 2, 2, 700)
    data = data_of(found.to_html())
    assert len(data["ids"]) < 700 and data["next"]["after"] == found.ids[-1]
    assert str(found.ids[-1]) in data["texts"]


@pytest.mark.parametrize("name", ["x" * 250, "a\0b"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"no file can have the name .*; choose a shorter one"):
        check_output(tmp_path / name)


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe is no regular file; choose another name"):
        check_output(tmp_path / "pipe", force=True)


def test_saving(trace: Trace, tmp_path: Path) -> None:
    path = trace.save(tmp_path / "new" / "page.html")
    assert path.read_text("utf-8") == trace.to_html() and os.listdir(path.parent) == ["page.html"]
    with pytest.raises(FileExistsError, match=r"page.html exists already; .* force=True"):
        trace.save(path)
    path.write_text("old")
    assert trace.save(path, force=True).read_text("utf-8").startswith("<!doctype html>")
    with pytest.raises(FileExistsError, match="is a folder; give the name of a file"):
        trace.save(tmp_path, force=True)
    for below in (path / "below.html", path / "new" / "below.html"):
        with pytest.raises(OSError, match=rf"{below} cannot be written \({path} is no folder\)"):
            check_output(below)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that takes no files")
def test_a_folder_that_takes_no_files() -> None:
    with pytest.raises(OSError, match=r"/proc/page.html cannot be written .*; choose another"):
        check_output("/proc/page.html")


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "page.html")
    assert os.listdir(tmp_path / "new") == []


def test_nothing_half_written_is_left(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "page.html"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"/page.html cannot be written \(No space left"):
        trace.save(path, force=True)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]


def test_jupyter_gets_a_frame(trace: Trace) -> None:
    shown = trace._repr_html_()
    [page] = re.findall(r'^<iframe srcdoc="([^"]*)" sandbox="allow-scripts" .*></iframe>$', shown)
    assert html.unescape(page) == trace.to_html() and len(shown) < LIMIT


def test_files_of_the_page_are_short() -> None:
    for path in (ROOT / "llama" / "explain" / "page").iterdir():
        assert path.read_text("utf-8").count("\n") <= 300
