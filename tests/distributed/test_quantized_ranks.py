"""Quantized weights on several gloo ranks have the codes, scales and ids of one rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama import ModelArgs, Transformer
from llama.checkpoints import load
from llama.checkpoints.convert import quantize
from llama.checkpoints.inspect import describe, rank_bytes
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.plan import PlanOptions, make_plan
from llama.checkpoints.source import Source
from llama.distributed import tensor_parallel
from llama.distributed.sharding import rank_part, weight_shapes
from llama.layers.blocks import dequantize_blocks
from llama.layers.quantization import dequantize_int4, dequantize_int8
from llama.layers.quantized_linear import quantized
from llama.layers.replace import replace_modules
from llama.layers.schemes import possible_ranks
from tests.distributed import rank_cases
from tests.distributed.test_tensor_parallel import (
    LLAMA_8B,
    SCRIPT,
    assert_equal,
    decoding_collectives,
    results,
    torchrun,
    write,
)

# On 4 ranks, each has one KV head of 8 rows: half a tile of int4.
WIDE: dict[str, Any] = {"dim": 256, "n_heads": 32, "n_kv_heads": 4, "multiple_of": 256}
# All ranks share one KV head. On 4 ranks, one has no ids, and wo has 32 columns on each.
TIED: dict[str, Any] = {"dim": 128, "n_heads": 8, "n_kv_heads": 1, "multiple_of": 128}
# wo has two blocks of 256 columns, and the ids of a rank no whole tiles.
BLOCKS: dict[str, Any] = {"dim": 512, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 512}
# (model, scheme, group of the first form of int4, or 0)
CASES = [
    ("wide", "int8", 0), ("wide", "int4", 32), ("wide", "int4", 64),
    ("tied", "int8", 0), ("tied", "int4", 32), ("blocks", "int4", 0),
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, each also quantized, as NAME-SCHEME-GROUP."""
    folder = tmp_path_factory.mktemp("quantized")
    write(folder / "wide", vocab_size=261, **WIDE)
    write(folder / "tied", vocab_size=5, tied=True, **TIED)
    write(folder / "blocks", vocab_size=261, n_layers=1, **BLOCKS)
    for name, scheme, group in [*CASES, ("tied", "int4", 64)]:
        stored = folder / f"{name}-{scheme}-{group}"
        quantize(folder / name, stored, rank_cases.scheme_of(scheme, group))
    return folder


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> list[dict[str, Any]]:
    return [rank_cases.generate(folder / f"{n}-{scheme}-{group}") for n, scheme, group in CASES]


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_quantized_ranks_generate_the_ids_of_one(
    folder: Path, one_rank: list[dict[str, Any]], n: int, tmp_path: Path
) -> None:
    cases = [case for case in CASES if n == 2 or case[0] != "blocks"]
    models = [
        [str(folder / m), str(folder / f"{m}-{s}-{group}"), s, group] for m, s, group in cases
    ]
    narrow = write(folder / f"narrow{n}", n_kv_heads=4, vocab_size=261)
    wrong_builds = [
        {"ckpt_dir": narrow, "quantize": "int4"},
        {"ckpt_dir": str(folder / "wide-int8-0"), "compile": True},
    ]
    if n == 4:
        wrong_builds.append({"ckpt_dir": str(folder / "tied-int4-64")})
    arguments = json.dumps({"models": models, "wrong_builds": wrong_builds})
    assert len(results(torchrun(n, str(SCRIPT), "quantized", arguments, str(tmp_path)))) == n
    for rank in range(n):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        for (quantized_ids, stored_ids, different), expected in zip(
            result["generated"], one_rank[: len(cases)], strict=True
        ):
            assert different == []
            assert_equal(quantized_ids, expected)
            assert stored_ids == expected["greedy"][1]  # prompt 1 is SHARED
        assert result["maximum"] == [n - 1, torch.inf]
        assert result["collectives"] == decoding_collectives(1 if n == 2 else 2)
        assert result["errors"][0] == (
            "ValueError: layers.0.attention.wo.weight: int4, the output in 6 bits keeps 32 columns "
            f"together, which do not divide the {32 // n} columns of each of {n} ranks; use one of "
            "[1] ranks, or int8"
        )
        assert "a compiled step runs on one rank" in result["errors"][1]
        if n == 4:
            assert result["errors"][2].endswith(
                "wo.weight: int4 in groups of 64, the output in 8 bits keeps 64 columns together, "
                "which do not divide the 32 columns of each of 4 ranks; use one of [1, 2] ranks, "
                "or int8"
            )


def dequantized(source: Source, layer: str, args: ModelArgs, rank: int, size: int) -> Tensor:
    """A rank's part of a quantized weight, as floats."""

    def part(kind: str) -> Tensor:
        return load.read_part(source, f"{layer}.{kind}", args, rank, size)

    if f"{layer}.blocks" in source.shapes():
        blocks = part("blocks")
        return dequantize_blocks(blocks, 16 * len(blocks))
    if f"{layer}.q" in source.shapes():
        return dequantize_int8(part("q"), part("scale"))
    tiles = part("packed"), part("scale"), part("zero")
    return dequantize_int4(*tiles, 16 * len(tiles[0]))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("name", "scheme", "group"), CASES)
def test_parts_dequantize_to_parts_of_the_weight(
    folder: Path, name: str, scheme: str, group: int, n: int
) -> None:
    if (name, n) == ("blocks", 4):
        pytest.skip("these ranks would share blocks")
    source = open_checkpoint(folder / f"{name}-{scheme}-{group}")
    args = source.args()
    for weight, shape in weight_shapes(args).items():
        layer = weight.removesuffix(".weight")
        if weight in source.shapes():
            continue
        whole = dequantized(source, layer, args, 0, 1)[: shape[0]]
        for rank in range(n):
            dim, start, stop = rank_part(weight, args, rank, n)  # type: ignore[misc]
            expected = whole.narrow(dim, start, stop - start)
            got = dequantized(source, layer, args, rank, n)
            assert torch.equal(got[: len(expected)], expected) and not got[len(expected) :].any()


def test_whole_tiles_are_views_of_the_file(folder: Path) -> None:
    source = open_checkpoint(folder / "wide-int4-32")
    args = source.args()
    for kind, view in (("wq", True), ("w1", True), ("wk", False)):
        name = f"layers.1.{'feed_forward' if kind == 'w1' else 'attention'}.{kind}.packed"
        w, part = source.read(name), load.read_part(source, name, args, 1, 4)
        assert (part.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()) == view
        assert part.is_contiguous()


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_memory_of_a_rank(monkeypatch: pytest.MonkeyPatch, scheme: str, size: int) -> None:
    """8B: a rank has its share of the bytes, and at most 3 % more."""

    def weight_bytes() -> int:
        model = Transformer(ModelArgs(**LLAMA_8B)).bfloat16()
        replace_modules(model, {nn.Linear: quantized(scheme)})
        return sum(w.nbytes for w in model.state_dict().values())

    with torch.device("meta"):
        whole = weight_bytes()
        monkeypatch.setattr(tensor_parallel, "size", lambda: size)
        assert whole / size <= weight_bytes() <= 1.03 * whole / size


@pytest.mark.parametrize(("name", "scheme", "group"), CASES)
def test_inspect_and_plan_list_the_ranks(folder: Path, name: str, scheme: str, group: int) -> None:
    """With the bytes that rank 0 loads."""
    source = open_checkpoint(folder / f"{name}-{scheme}-{group}")
    args = source.args()
    possible = possible_ranks(args, rank_cases.scheme_of(scheme, group))
    assert (
        possible
        == {
            ("wide", "int8"): [1, 2, 4, 8, 16, 32],
            ("wide", "int4"): [1, 2, 4, 8] if group == 32 else [1, 2, 4],
            ("tied", "int8"): [1, 2, 4, 8],
            ("tied", "int4"): [1, 2, 4],
            ("blocks", "int4"): [1, 2],
        }[name, scheme]
    )
    text = describe(source)
    assert [int(line[12:16]) for line in text.splitlines() if "of weights each" in line] == possible
    options = PlanOptions(ckpt_dir=str(source.path), max_seq_len=8, dtype="fp32")
    for n in possible:
        figures = make_plan(replace(options, ranks=n))
        parts = [load.read_part(source, stored, args, 0, n) for stored in source.shapes()]
        assert rank_bytes(source, args, n) == sum(part.nbytes for part in parts)
        assert figures["weights"] == sum(part.nbytes for part in parts)
        assert figures["possible_ranks"] == possible
    other = {"int8": "int4", "int4": "int8"}[scheme]
    with pytest.raises(ValueError, match=f"quantized already, to {scheme}"):
        make_plan(replace(options, quantize=other))
