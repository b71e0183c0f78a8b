"""plan.py: figures follow from the published sizes by plain arithmetic; mistakes are reported."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama.checkpoints.footprint import Footprint
from llama.checkpoints.hardware import Hardware, parse_size
from llama.checkpoints.plan import PlanOptions, Release, as_text, make_plan, release, report
from llama.layers.schemes import SCHEMES
from llama.model import ModelArgs
from tests.checkpoints.test_inspect import RELEASES
from tests.checkpoints.test_inspect import release as published

ROOT = Path(__file__).parents[2]
GB = 10**9


def planned(**changes: Any) -> dict[str, Any]:
    figures = make_plan(PlanOptions(**changes))
    assert json.loads(json.dumps(figures)) == figures
    return figures


def test_releases_are_those_published() -> None:
    for name in RELEASES:
        params, tied, _, _ = published(name)
        context = 131072 if params.get("use_scaled_rope") else 8192
        want = ModelArgs(**params, max_seq_len=context)
        sizes = {field.name: getattr(want, field.name) for field in dataclasses.fields(Release)}
        version, size = name.lower().split()
        for spelled in (f"{version}-{size}", f"{version}-{size}".upper()):
            assert release(spelled) == (Release(**sizes), tied)
        if version != "3":
            assert release(size) == (Release(**sizes), tied)
    assert release("3.3-70b") == release("3.1-70b") == release("70b")
    with pytest.raises(ValueError, match=r"unknown shape '9b'; use one of .*'8b'.*'3.1-405b'"):
        release("9b")


def test_405b_on_16_ranks() -> None:
    f = planned(
        shape="405b", ranks=16, max_batch_size=8, device_memory="80GB",
        memory_bandwidth="3.35TB/s", interconnect="450GB/s",
    )  # fmt: skip
    dim, layers, hidden, vocab, head = 16384, 126, 53248, 128256, 128
    weights = {
        "embedding": vocab * dim // 16,
        "attention": layers * (2 * dim * dim // 16 + 2 * head * dim),  # 1 of 8 KV heads
        "feed_forward": layers * 3 * dim * hidden // 16,
        "norms": (2 * layers + 1) * dim,
        "output": vocab * dim // 16,
    }
    assert f["weights_by_kind"] == {kind: 2 * n for kind, n in weights.items()}
    assert f["weights"] == 2 * sum(weights.values())
    assert f["kv_cache"] == 8 * 8192 * layers * 2 * head * 2
    assert f["ranks_a_kv_head"] == 2
    assert f["possible_ranks"] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert f["fitting_ranks"] == [16, 32, 64, 128]  # 811.7 GB of weights: not 8 x 80
    assert f["fits"] and f["left"] == 80 * GB - f["needed"]
    # 253 sums of dim numbers over 16 ranks, and a 16th of the logits to 15 others, in bf16. The
    # last collective, of the ids drawn, is not counted in bytes.
    sent = 2 * 15 * 253 * dim * 2 // 16 + 15 * vocab // 16 * 2
    assert f["sent_a_token"] == sent and f["collectives_a_step"] == 255
    read = f["weights"] - f["weights_by_kind"]["embedding"] + f["kv_cache"]
    assert f["read_a_step"] == read
    rates = f["tokens_a_second"]
    assert rates["memory"] == pytest.approx(8 * 3.35e12 / read)
    # nccl's tree over 2 nodes of 8: 6.8 us, and twice 7 steps of 0.6 and one of 5 between them.
    latency = 255 * (6.8 + 2 * (7 * 0.6 + 5.0)) * 1e-6
    assert f["latency"] == pytest.approx(latency / 255)
    assert rates["interconnect"] == pytest.approx(8 / (8 * sent / 450e9 + latency))
    assert rates["both"] == pytest.approx(8 / (read / 3.35e12 + 8 * sent / 450e9 + latency))


@pytest.mark.parametrize("quantize", [None, "int4"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_largest_is_the_last_that_fits(dtype: str, quantize: str | None) -> None:
    footprint = Footprint(*release("8b"), 2, dtype, SCHEMES.get(quantize or ""))
    f = report(footprint, 3, 5000, Hardware(memory=24 * GB))
    context, batch = f["largest_context"], f["largest_batch"]
    assert footprint.needed(3, context) <= 24 * GB < footprint.needed(3, context + 1)
    assert footprint.needed(batch, 5000) <= 24 * GB < footprint.needed(batch + 1, 5000)
    parts = footprint.memory(3, 5000)
    fixed = parts["weights"] + parts["kv_cache"] + parts["rotary_table"]
    assert f["needed"] == fixed + max(parts["prefill_activations"], parts["decode_activations"])


def test_what_does_not_fit() -> None:
    f = planned(shape="8b", device_memory="16GB")
    assert not f["fits"] and f["left"] < 0
    assert f["largest_context"] == f["largest_batch"] == 0  # the weights alone are 16.06 GB
    text = as_text(f)
    assert "16.00 GB: does not fit, 1.21 GB too little" in text
    text = as_text(planned(shape="405b", ranks=64, device_memory="1GB"))
    assert "ranks that fit   none" in text


def test_text() -> None:
    hardware = Hardware(80 * GB, 1e12, interconnect=1e11, latency=2e-5)
    text = as_text(report(Footprint(*release("1b"), 16), 2, 4096, hardware))
    lines = {line[:17].strip(): line[17:] for line in text.splitlines()}
    assert lines["held as"] == "bf16, output tied to the embedding"
    assert lines["ranks"] == "16, each KV head on 2 of them"
    assert lines["embedding"].split()[:3] == ["0.03", "GB", f"{128256 // 16 * 2048 * 2:,}"]
    assert lines["output"].split()[2] == "0"
    assert lines["possible ranks"] == "1, 2, 4, 8, 16, 32"
    assert text.count("at most") == 3
    assert "35 collectives a step, 20.0 us each" in lines["a token sends"]
    alone = as_text(planned(shape="1b", interconnect="1GB/s"))
    for absent in ("device memory", "a token sends", "at most"):
        assert absent not in alone


def test_a_tied_output_is_quantized_apart() -> None:
    """The embedding stays plain, and the output is int8 codes and scales of its own."""
    plain, int8 = planned(shape="1b"), planned(shape="1b", quantize="int8")
    assert plain["weights_by_kind"]["output"] == 0
    assert int8["weights_by_kind"]["embedding"] == 128256 * 2048 * 2
    assert int8["weights_by_kind"]["output"] == 128256 * (2048 + 4)
    assert int8["read_a_step"] == int8["weights"] - 128256 * 2048 * 2 + int8["kv_cache"]
    assert plain["read_a_step"] == plain["weights"] + plain["kv_cache"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * GB), ("80GiB", 80 * 2**30), ("80e9", 80 * GB), ("80000000000", 80 * GB),
     ("1.5 TB", 1500 * GB), ("512MiB", 2**29), ("64000kB", 64 * 10**6),
     ("3e6B", 3 * 10**6), ("8E9B", 8 * GB)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "device_memory") == size
    assert parse_size(f"{text}/s", "interconnect", rate=True) == size
    assert parse_size(text, "interconnect", rate=True) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "80XB", "80 G B", "-80GB", "nan", "inf", "1.2.3GB", "80GB/h", "80GB/s"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"device_memory .* is no size; write it as 80GB"):
        parse_size(text, "device_memory")


def test_sizes_out_of_range() -> None:
    for text in ("0", "0GB", "80", "1e999"):
        with pytest.raises(ValueError, match=r"is \S+ bytes; write it as 80GB"):
            parse_size(text, "device_memory")
    with pytest.raises(ValueError, match=r"write it as 450GB/s; 8 bits \(b\) are a byte \(B\)"):
        parse_size("400Gb/s", "interconnect", rate=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give either --shape or --ckpt_dir"),
        ({"shape": "8b", "ckpt_dir": "x"}, "give either --shape or --ckpt_dir"),
        ({"shape": "8b", "ranks": 3}, r"3 ranks cannot share .* use one of \[1, 2, 4, 8, 16, 32\]"),
        ({"shape": "8b", "ranks": 0}, "0 ranks cannot share"),
        ({"shape": "8b", "ranks": "two"}, "'two' ranks cannot share"),
        ({"shape": "8b", "max_batch_size": 0}, "max_batch_size must be a positive integer, not 0"),
        ({"shape": "8b", "max_seq_len": -1}, "max_seq_len must be a positive integer, not -1"),
        ({"shape": "8b", "max_seq_len": 1.5}, "max_seq_len must be a positive integer, not 1.5"),
        ({"shape": "8b", "dtype": "int8"}, "unknown dtype 'int8'; use one of"),
        ({"shape": "8b", "quantize": "int5"}, "unknown scheme 'int5'"),
        ({"shape": "8b", "device_memory": "much"}, "device_memory 'much' is no size"),
        ({"shape": "8b", "compute": "989"}, "compute '989' is no speed; write it as 989TFLOPS"),
        ({"shape": "8b", "latency": "15"}, "latency '15' is no time .* write it as 15us"),
        ({"shape": "8b", "latency": "2s"}, "latency '2s' is no time"),
        ({"shape": "8b", "gpu": "v100"}, r"unknown gpu 'v100'; use one of \['a100', 'h100'"),
        ({"shape": "8b", "prompt_tokens": 9}, "give both --prompt_tokens and --answer_tokens"),
    ],
)  # fmt: skip
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(PlanOptions(**changes))


def test_int4_needs_whole_groups_on_each_rank() -> None:
    args = ModelArgs(dim=64, n_layers=1, n_heads=8, vocab_size=104, multiple_of=64)
    with pytest.raises(ValueError, match=r"4 ranks .* model in int4; use one of \[1\]"):
        Footprint(args, False, 4, "bf16", SCHEMES["int4"])
    assert report(Footprint(args, False, 4), 1, 8)["possible_ranks"] == [1, 2, 4, 8]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "llama", "plan", *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


def test_command_line(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = str(tiny_checkpoint())
    done = command("--ckpt_dir", folder, "--ranks", "2", "--device-memory", "80e9", "--json")
    assert done.returncode == 0, done.stderr
    f = json.loads(done.stdout)
    assert (f["dim"], f["vocab_size"], f["ranks"], f["fits"]) == (64, 128256, 2, True)
    done = command("--shape", "70b", "--ranks", "7")
    assert done.returncode == 2
    assert done.stderr.startswith("llama3: 7 ranks cannot share this model; use one of [1, 2, 4,")
