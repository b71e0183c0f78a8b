"""A checkpoint whose residual stream is rotated at random: nearly the same function, other weights.

    python -m benchmarks.rotated_model SRC DST

The weights of the demo model lie on a 4-bit grid, on which int4 loses nothing. After a rotation
they lie on no grid, so that rounding costs what it costs with a model that was never quantized.

With R orthogonal, h becomes h R: an RMS norm without weights commutes with R, so the norms' weights
are first multiplied into the linears that read them. Everything is computed in fp64 and stored in
bf16.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.script import run_benchmark
from llama.checkpoints.open import open_checkpoint
from llama.common.files import new_folder, write_json

READERS = {  # of the residual stream, after this norm
    "attention_norm": ("attention.wq", "attention.wk", "attention.wv"),
    "ffn_norm": ("feed_forward.w1", "feed_forward.w3"),
}
WRITERS = ("attention.wo", "feed_forward.w2")


def random_rotation(dim: int, seed: int) -> Tensor:
    """A random orthogonal matrix (dim, dim) fp64."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(normal)
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


def rotate(weights: dict[str, Tensor], n_layers: int, seed: int = 0) -> dict[str, Tensor]:
    """The weights (Meta's names) of the same model with a rotated residual stream, fp32."""
    dim = weights["norm.weight"].numel()
    R = random_rotation(dim, seed)

    def read(reader: str, norm: str) -> Tensor:
        scaled = weights[f"{reader}.weight"].double() * weights[f"{norm}.weight"].double()
        return (scaled @ R).float()

    rotated = {
        "tok_embeddings.weight": (weights["tok_embeddings.weight"].double() @ R).float(),
        "output.weight": read("output", "norm"),
        "norm.weight": torch.ones(dim, dtype=torch.float32),
    }
    for i in range(n_layers):
        layer = f"layers.{i}"
        for norm, readers in READERS.items():
            rotated[f"{layer}.{norm}.weight"] = torch.ones(dim, dtype=torch.float32)
            for name in readers:
                rotated[f"{layer}.{name}.weight"] = read(f"{layer}.{name}", f"{layer}.{norm}")
        for name in WRITERS:
            w = weights[f"{layer}.{name}.weight"].double()
            rotated[f"{layer}.{name}.weight"] = (R.T @ w).float()
    return rotated


def rotated_model(src: str, dst: str, *, seed: int = 0) -> None:
    """Write the checkpoint SRC, which is in Meta's layout, rotated, as the folder DST."""
    source = open_checkpoint(src)
    weights = {name: source.read(name) for name in source.shapes()}
    with new_folder(Path(dst)) as folder:
        write_json(folder / "params.json", source.params)
        for file in Path(source.path).glob("tokenizer.model*"):
            shutil.copyfile(file, folder / file.name)
        rotated = rotate(weights, source.args().n_layers, seed)
        torch.save({n: w.bfloat16() for n, w in rotated.items()}, folder / "consolidated.00.pth")


if __name__ == "__main__":
    run_benchmark(rotated_model, "rotated_model")
