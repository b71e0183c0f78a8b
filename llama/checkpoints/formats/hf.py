"""Hugging Face's layout: config.json and safetensors, read as weights under Meta's names.

Knows the folder and its safetensors; `hf_config` knows config.json and tensor names,
`hf_tokenizer_import` tokenizer.json.
Shapes: D dim, d head_dim. The rows of a query or key head are rotary pairs: HF stores the first
members of all pairs, then the second ones; Meta stores pair after pair.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.checkpoints.formats.chat_settings import StoredTemplates, read_hf_templates
from llama.checkpoints.formats.hf_config import INDEX_FILE, meta_name, read_config
from llama.checkpoints.formats.hf_tokenizer_import import read_vocabulary, stop_ids
from llama.checkpoints.source import Source, same_weights, sample
from llama.common.extras import install_line
from llama.common.files import read_json

SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

MAX_FILES = 10_000  # the numbers in their names have five digits


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads (heads * d, D) from HF's order to Meta's: row j -> 2j, row d/2 + j -> 2j + 1."""
    halves = rows.view(-1, 2, head_dim // 2, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


class _StoredWeight(NamedTuple):
    """Where a weight is stored."""

    file: Any  # an open safetensors file
    name: str  # in that file
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """The whole weight, a view of the mapped file: pages are read when used."""
        view: Tensor = self.file.get_tensor(self.name)
        return view


class HFSource(Source):
    """An open folder of Hugging Face. Files are mapped: reading a part reads only its pages.

    Args:
        path: a folder with config.json and one or several safetensors files.

    Raises:
        FileNotFoundError: no folder, no config.json or no safetensors in it.
        ValueError: damaged files, or a model that does not compute what Meta's code computes.
        ImportError: the `safetensors` package is missing.
    """

    layout = "hf"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no Hugging Face folder at {path}; check the path")
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(
                f"no config.json in {path}; a Hugging Face model has one beside its safetensors"
            )
        config = read_json(self.path / "config.json")
        self.params = read_config(config, self.path / "config.json")
        self._head_dim = self.params["dim"] // self.params["n_heads"]
        self._weights: dict[str, _StoredWeight] = {}
        for file in weight_files(self.path):
            self._index_file(file)
        self._positions = config.get("max_position_embeddings")
        self._add_alias(config.get("tie_word_embeddings", False))
        self.tied = self._is_tied(config.get("tie_word_embeddings", False))
        if self.tied and "tok_embeddings.weight" in self._weights:
            self._weights["output.weight"] = self._weights["tok_embeddings.weight"]

    @property
    def context(self) -> int:
        """See `Source.context`."""
        n = self._positions
        return n if isinstance(n, int) and n > 0 else super().context

    def _index_file(self, path: Path) -> None:
        """Add the names, shapes and dtypes of one file to `_weights`."""
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name.endswith("rotary_emb.inv_freq"):
                continue  # follows from config.json
            meta = meta_name(name) or name
            if meta in self._weights:
                raise ValueError(
                    f"{path} repeats {name} of another file; remove the files of another model"
                )
            part = file.get_slice(name)
            kind = part.get_dtype()
            if kind not in SAFETENSORS_DTYPES:
                raise ValueError(
                    f"{path}: {name} is of type {kind}; use the unquantized model, of a type in "
                    f"{list(SAFETENSORS_DTYPES)}"
                )
            dtype = SAFETENSORS_DTYPES[kind]
            self._weights[meta] = _StoredWeight(file, name, tuple(part.get_shape()), dtype)

    def _add_alias(self, tied_in_config: bool) -> None:
        """Give a tied embedding that is stored as lm_head.weight alone its own name.

        `safetensors.torch.save_model` stores one of two names, and the other in the metadata.
        """
        head = self._weights.get("output.weight")
        if head is None or "tok_embeddings.weight" in self._weights:
            return
        alias = (head.file.metadata() or {}).get("model.embed_tokens.weight")
        if tied_in_config or alias == head.name:
            self._weights["tok_embeddings.weight"] = head

    def _is_tied(self, tied_in_config: bool) -> bool:
        """Whether the output's weights are those of the embedding, by config.json and content."""
        embed, head = (self._weights.get(f"{n}.weight") for n in ("tok_embeddings", "output"))
        if embed is None or head is None:
            if head is None and not tied_in_config:
                raise ValueError(
                    f"{self.path} has no lm_head.weight, and config.json does not tie it to the "
                    "embedding; download it again, or set tie_word_embeddings to true"
                )
            return head is None
        same = same_weights(embed.tensor(), head.tensor())
        if tied_in_config and not same:
            raise ValueError(
                f"{self.path}: config.json ties lm_head.weight to the embedding, but the file has "
                "a different one; set tie_word_embeddings to false, or remove lm_head.weight"
            )
        return same

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: weight.shape for name, weight in self._weights.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._weights[name].dtype

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Source.read`. Query and key rows are copies in Meta's order; the rest are views."""
        whole = self._weights[name].tensor()
        stop = whole.shape[dim] if stop is None else stop
        part = whole.narrow(dim, start, stop - start)
        if name.split(".")[-2] not in ("wq", "wk"):
            return part
        d = self._head_dim
        assert dim == 1 or start % d == stop % d == 0, f"{name}: {start}:{stop} splits a head"
        return interleave(part, d)

    def sample(self, name: str) -> bytes:
        return sample(self._weights[name].tensor())  # as stored: heads are not reordered

    def vocabulary(self) -> tuple[bytes, dict[str, Any]] | None:
        """(rank file, sidecar) of tokenizer.json; None: there is none, or a tokenizer.model.

        Raises:
            ValueError: a damaged file, or a tokenizer that ranks alone cannot express.
        """
        return read_vocabulary(self.path)

    def stop_ids(self) -> list[int]:
        return stop_ids(self.path)

    def chat_templates(self) -> StoredTemplates:
        """See `Source.chat_templates`."""
        return read_hf_templates(self.path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder, see `named_files`.

    Raises:
        FileNotFoundError, ValueError: see `named_files`; or a file is missing.
    """
    files = named_files(folder)
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} lacks {len(missing)} files: {missing[0]}; download them")
    return files


def named_files(folder: Path) -> list[Path]:
    """The safetensors that a folder must have: the single file, those of its index, or all numbers.

    Raises:
        FileNotFoundError: it has none of these.
        ValueError: the index, or a number in a name, is wrong.
    """
    single, index = folder / "model.safetensors", folder / INDEX_FILE
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; download it again")
        names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names files outside its folder: {outside[0]}")
        return [folder / name for name in names]
    names = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    totals = {int(m[1]) for name in names if (m := re.search(r"-of-(\d+)\.", name))}
    if not totals:
        other = " and has only .bin files: save it as safetensors" * any(folder.glob("*.bin"))
        raise FileNotFoundError(f"{folder} has no model.safetensors{other or '; download it'}")
    if max(totals) > MAX_FILES:
        raise ValueError(
            f"{folder} has a file of {max(totals)} files, more than {MAX_FILES}; remove it"
        )
    return [
        folder / f"model-{i + 1:05}-of-{n:05}.safetensors" for n in sorted(totals) for i in range(n)
    ]


def open_safetensors(path: Path) -> Any:
    """Map a safetensors file; only its header is read.

    Raises:
        ValueError: the file is truncated, a web page or a Git-LFS pointer.
        ImportError: the `safetensors` package is missing.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise ImportError(f"Hugging Face files need a package: {install_line('hf')}") from e
    with open(path, "rb") as f:
        head = f.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git-LFS pointer; fetch the file itself: git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page; download the file again")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise ValueError(f"{path} is truncated or damaged ({e}); download it again") from None
