"""Shared fixtures: the demo model, tiny random checkpoints, tokenizers, the CPU kernels."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llama import Llama
from llama.layers import kernels
from tests.exact_products import exact_products
from tests.models import TINY, random_weights


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; `pytest --slow` runs it"))
    if not torch.cuda.is_available() and not os.environ.get("LLAMA3_REHEARSE_CUDA"):
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(
                    pytest.mark.skip(
                        reason="needs a GPU; LLAMA3_REHEARSE_CUDA=1 runs it on the CPU"
                    )
                )


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test gets the same random inputs in each run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ops() -> Iterator[object]:
    """The CPU kernels."""
    if not kernels.load():
        pytest.skip("the kernels cannot be compiled here (no C++ compiler, or LLAMA3_KERNELS=0)")
    yield torch.ops.llama3
    torch.ops.llama3.use_variant("")


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "plain"])
def variant(request: pytest.FixtureRequest, ops: object) -> Iterator[str]:
    """The kernels of one instruction set."""
    if request.param not in torch.ops.llama3.variants():
        pytest.skip(f"this processor has no {request.param}")
    torch.ops.llama3.use_variant(request.param)
    yield request.param
    torch.ops.llama3.use_variant("")


@pytest.fixture(name="exact_products")
def without_integer_products() -> Iterator[None]:
    """See `exact_products`."""
    with exact_products():
        yield


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """The demo model in Meta's layout."""
    from llama.checkpoints.demo_model import ensure_demo_model

    return ensure_demo_model()


@pytest.fixture(scope="session")
def llama3_tokenizer_path() -> Path:
    """Meta's 128k rank file, from the package llama-models."""
    import llama_models.llama3

    return Path(llama_models.llama3.__path__[0]) / "tokenizer.model"


@pytest.fixture(scope="session")
def byte_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary for tests that are not about text: 256 bytes and 256 special tokens."""
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.model"
    tokens = (base64.b64encode(bytes([i])).decode() for i in range(256))
    path.write_text("".join(f"{token} {i}\n" for i, token in enumerate(tokens)))
    return path


@pytest.fixture(scope="session")
def demo(demo_dir: Path) -> Llama:
    """The demo model in fp32 on the CPU."""
    return Llama.build(
        demo_dir, demo_dir / "tokenizer.model", 256, 8, device="cpu", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def one_rank_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The process group of one rank that Meta's code needs."""
    from fairscale.nn.model_parallel import initialize as fs_init

    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    fs_init.initialize_model_parallel(1)
    yield
    fs_init.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Write a checkpoint of random weights in Meta's layout: `tiny_checkpoint(dim=32, ...)`."""

    def write(**changes: Any) -> Path:
        params = TINY | changes
        folder = tmp_path_factory.mktemp("tiny")
        (folder / "params.json").write_text(json.dumps(params))
        torch.save(random_weights(**params), folder / "consolidated.00.pth")
        return folder

    return write


@pytest.fixture(scope="session")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny checkpoint with the vocabulary of `byte_tokenizer_path`. Tests do not write to it."""
    return tiny_checkpoint(vocab_size=512)
