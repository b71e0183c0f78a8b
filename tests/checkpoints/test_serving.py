"""serving.py, hardware.py: times and requests a second by plain arithmetic on published sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama import ModelArgs, Transformer
from llama.checkpoints.footprint import Footprint
from llama.checkpoints.hardware import (
    Hardware,
    collective_latency,
    gpu,
    parse_compute,
    parse_latency,
)
from llama.checkpoints.plan import PlanOptions, as_text, make_plan, release
from llama.checkpoints.serving import decode_time, prefill_time, serving

# Numbers of weights in the linears of all layers, and in the output.
LAYERS_8B = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
LAYERS_70B = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
OUTPUT_8B, OUTPUT_70B = 128256 * 4096, 128256 * 8192
H100 = Hardware(80 * 10**9, 3.35e12, 989e12, 450e9)


def test_a_decode_step_of_8b() -> None:
    """7.5 billion weights read in bf16, and 128 kB of cache for each token of each row."""
    time = decode_time(Footprint(*release("8b")), H100, rows=10, filled=1100)
    norms = (2 * 32 + 1) * 4096
    read = 2 * (LAYERS_8B + OUTPUT_8B + norms) + 10 * 1100 * 2 * 32 * 8 * 128 * 2
    done = 10 * (2 * (LAYERS_8B + OUTPUT_8B) + 4 * 32 * 32 * 128 * 1100)
    assert time.memory == pytest.approx(read / 3.35e12)
    assert time.compute == pytest.approx(done / 989e12)
    assert (time.total, time.limit) == (time.memory, "memory")
    assert decode_time(Footprint(*release("8b")), H100, 2000, 100).limit == "compute"


def test_a_decode_step_of_70b_on_4_ranks() -> None:
    footprint, hardware = Footprint(*release("70b"), 4), replace(H100, latency=15e-6)
    time = decode_time(footprint, hardware, rows=8, filled=2000)
    norms = (2 * 80 + 1) * 8192
    read = 2 * ((LAYERS_70B + OUTPUT_70B) // 4 + norms) + 8 * 2000 * 2 * 80 * 2 * 128 * 2
    done = 8 * (2 * (LAYERS_70B + OUTPUT_70B) // 4 + 4 * 80 * 16 * 128 * 2000)
    # 161 all-reduces of 8192 numbers for each row, and a quarter of the logits to 3 ranks.
    sent = 8 * (2 * 3 * 161 * 8192 * 2 // 4 + 3 * 128256 // 4 * 2)
    assert time.memory == pytest.approx(read / 3.35e12)
    assert time.compute == pytest.approx(done / 989e12)
    assert time.collectives == pytest.approx(163 * 15e-6 + sent / 450e9)
    assert time.total == pytest.approx(read / 3.35e12 + 163 * 15e-6 + sent / 450e9)
    slow = replace(H100, latency=1e-3)
    assert decode_time(footprint, slow, 8, 2000).limit == "collectives"


def test_prefill() -> None:
    """1,024 positions: two steps read the weights, and the logits of the last one are needed."""
    time = prefill_time(Footprint(*release("8b")), H100, 1024)
    pairs = 1024 * 1025 // 2
    done = 1024 * 2 * LAYERS_8B + 2 * OUTPUT_8B + 4 * 32 * 32 * 128 * pairs
    assert time.compute == pytest.approx(done / 989e12) and time.limit == "compute"
    read = 2 * (LAYERS_8B + OUTPUT_8B + 65 * 4096)
    assert time.memory == pytest.approx(2 * read / 3.35e12)
    shared = prefill_time(Footprint(*release("70b"), 4), Hardware(latency=1e-5), 1024)
    assert shared.total == pytest.approx(2 * 163 * 1e-5)


def test_operations_are_those_that_torch_counts() -> None:
    args = ModelArgs(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, multiple_of=16, max_seq_len=32
    )
    model = Transformer(args).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 24, dtype=torch.long))
    # Torch's products cover all pairs and compute all logits.
    assert Footprint(args, False).flops(24, 24 * 24, 24) == counter.get_total_flops()


def test_requests_a_second_of_8b() -> None:
    footprint = Footprint(*release("8b"))
    f = serving(footprint, H100, prompt=1000, answer=250, context=8192)
    rows = f["rows"]
    assert footprint.needed(rows, 8192) <= 80 * 10**9 < footprint.needed(rows + 1, 8192)
    prefill = prefill_time(footprint, H100, 1000).total
    step = decode_time(footprint, H100, rows, 1000 + 125).total
    rate = 1 / (prefill + 249 * step / rows)
    assert f["requests_a_second"] == pytest.approx(rate)
    assert f["tokens_a_second"] == pytest.approx(250 * rate)
    assert f["seconds_a_request"] == pytest.approx(rows * prefill + 249 * step)
    # Pages: a row occupies 71 pages of 16 tokens and not 8192 tokens.
    n = f["paged_rows"]
    fixed = [footprint.needed(m, 8192) - footprint.cache(m, 8192) for m in (n, n + 1)]
    each = 71 * 16 * 131072
    assert fixed[0] + n * each <= 80 * 10**9 < fixed[1] + (n + 1) * each
    paged = 1 / (prefill + 249 * decode_time(footprint, H100, n, 1125).total / n)
    assert f["paged_requests_a_second"] == pytest.approx(paged)
    assert f["export_pays"] and paged > 1.5 * rate


def test_when_an_export_does_not_pay() -> None:
    """Rows as long as the requests hold nearly as many as pages do."""
    f = serving(Footprint(*release("8b")), H100, prompt=1000, answer=24, context=1024)
    assert not f["export_pays"]
    assert 1 <= f["paged_requests_a_second"] / f["requests_a_second"] < 1.05
    one = serving(Footprint(*release("8b")), H100, prompt=100, answer=1, context=101)
    assert one["requests_a_second"] == pytest.approx(1 / one["prefill_seconds"])


def test_the_latency_of_collectives() -> None:
    """nccl's model, in microseconds: base + steps within a node + steps between nodes."""
    for ranks, latency in (
        (1, 0.0), (2, 6.6 + 2 * 0.6), (4, 6.6 + 6 * 0.6), (8, 6.6 + 14 * 0.6),
        (16, 6.8 + 2 * (7 * 0.6 + 5.0)), (64, 6.8 + 2 * (7 * 0.6 + 3 * 5.0)),
    ):  # fmt: skip
        assert collective_latency(ranks) == pytest.approx(latency * 1e-6)


def test_figures_of_hardware_as_text() -> None:
    for text in ("989TFLOPS", "989 TFLOP/s", "0.989PFLOPs", "989e12"):
        assert parse_compute(text) == pytest.approx(989e12)
    for text in ("", "fast", "989GB/s", "1e400"):
        with pytest.raises(ValueError, match="write it as 989TFLOPS"):
            parse_compute(text)
    assert parse_latency("15us") == pytest.approx(15e-6) == parse_latency("1.5e-5 s")
    assert parse_latency("0.1ms") == pytest.approx(1e-4)
    assert gpu("H100") == H100


def planned(**options: Any) -> dict[str, Any]:
    figures = make_plan(PlanOptions(**options))
    assert json.loads(json.dumps(figures)) == figures
    return figures


def test_plan_with_a_gpu() -> None:
    f = planned(shape="8b", gpu="h100", prompt_tokens=1000, answer_tokens=250)
    assert f["serving"] == serving(Footprint(*release("8b")), H100, 1000, 250, 8192)
    assert f["device_memory"] == 80 * 10**9
    text = as_text(f)
    assert "1000 prompt and 250 answer tokens" in text and ": export to vLLM" in text
    less = planned(shape="8b", gpu="h100", device_memory="40GB", latency="0us", ranks=2)
    assert (less["device_memory"], less["latency"]) == (40 * 10**9, 0)
    none = planned(shape="70b", gpu="h100", prompt_tokens=9, answer_tokens=9)
    assert none["serving"]["rows"] == 0 and "no row of 8192 tokens fits" in as_text(none)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_memory": "80GB"}, "need --memory_bandwidth, --compute, or --gpu"),
        ({"gpu": "h100", "dtype": "fp32"}, "need --compute"),
        ({"gpu": "h100", "prompt_tokens": 8000}, r"8000 \+ 250 tokens do not fit a row of 8192"),
        ({"gpu": "h100", "prompt_tokens": 0}, "prompt_tokens must be a positive integer, not 0"),
        ({"gpu": "h100", "answer_tokens": -1}, "answer_tokens must be a positive integer"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**{"shape": "8b", "prompt_tokens": 1000, "answer_tokens": 250} | options)


def test_steps_add_up_to_the_plan() -> None:
    """The rates of `plan` are those of a decode step without arithmetic."""
    f = planned(shape="70b", ranks=4, gpu="h100", max_batch_size=8, max_seq_len=2000)
    time = decode_time(Footprint(*release("70b"), 4), replace(H100, compute=None), 8, 2000)
    latency = 163 * collective_latency(4)
    assert math.isclose(f["tokens_a_second"]["both"], 8 / (time.total + latency))
