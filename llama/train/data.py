"""Text files -> token ids on disk -> batches. Knows nothing about models.

Shapes: B rows, T context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama.common.files import new_folder, read_json
from llama.common.progress import progress
from llama.text.long_text import passages
from llama.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".md")
FORMAT = 1  # version of the files that `Corpus.tokenized` writes
PASSAGE = 1 << 20  # characters encoded at a time
MIN_CONTEXTS = 8  # shortest span of text, in contexts; see `Split`


class Split:
    """The token ids of one part of a corpus, and windows of them for a model.

    A window stays inside a span. Documents are joined, with EOS and BOS between them, until a span
    has at least 8 contexts; a short last document joins the span before it.

    Args:
        name: the split's name, for messages.
        ids: one dimension, in memory or memory-mapped.
        starts: index in `ids` where each document begins; the first is 0.
    """

    def __init__(self, name: str, ids: np.ndarray, starts: np.ndarray):
        self.name = name
        self.ids = ids
        self.starts = starts
        self._spans_of: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by context

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, context: int) -> None:
        """Raise a ValueError if the split is shorter than a window of `context` + 1 ids."""
        if len(self) > context:
            return
        flag = {"validation": "--val_fraction", "test": "--test_fraction"}.get(self.name)
        remedy = f", a larger {flag} (or 0)" if flag else ""
        raise ValueError(
            f"the {self.name} split has {len(self)} tokens, and one window needs {context + 1} "
            f"(max_seq_len + 1); give more text, a smaller --max_seq_len{remedy}"
        )

    def batch(
        self,
        step: int,
        batch_size: int,
        context: int,
        *,
        seed: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Random windows, and the same shifted by one id (targets): (B, T) int64 each.

        The result depends on the arguments alone, so that resuming needs no state. The `parts` of
        a step together are one batch of `parts * batch_size` rows.

        Raises:
            ValueError: the split is shorter than a window; `part` is not from 0 to `parts` - 1.
        """
        self.check(context)
        if not 0 <= part < parts:
            raise ValueError(f"part must be from 0 to {parts - 1}, not {part}")
        starts, stops = self._spans(context)
        total = np.cumsum(np.maximum(stops - starts - context, 0))  # windows up to a span's end
        draws = np.random.default_rng([seed, step]).integers(total[-1], size=parts * batch_size)
        draws = draws[part * batch_size : (part + 1) * batch_size]
        span = np.searchsorted(total, draws, side="right")
        first = stops[span] - context - (total[span] - draws)
        rows = torch.from_numpy(self.ids[first[:, None] + np.arange(context + 1)].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    def windows(
        self, context: int, batch_size: int = 1, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Consecutive windows that do not overlap, as pairs like those of `batch`.

        Every id but the first of a span is predicted once. The last window of a span may be
        shorter, and is then a batch of its own.

        Args:
            batch_size: most rows of a batch.
            most: most windows; of more, every second, third, ... is taken. None means all.
        """
        starts, stops = self._spans(context)
        counts = -((starts - stops + 1) // context)  # windows of each span
        every = 1 if most is None else max(1, -(-int(counts.sum()) // most))
        before = 0  # windows in the spans before
        rows: list[Tensor] = []
        for start, stop, count in zip(starts, stops, counts, strict=True):
            first = start + (-before % every) * context
            before += count
            for i in range(first, stop - 1, every * context):
                window = self.ids[i : min(i + context + 1, stop)].astype(np.int64)
                rows.append(torch.from_numpy(window))
                short = len(window) <= context
                if short and len(rows) > 1:
                    yield _pair(rows[:-1])
                if short or len(rows) == batch_size:
                    yield _pair(rows[-1:] if short else rows)
                    rows = []
        if rows:
            yield _pair(rows)

    def _spans(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and stops of the spans, as indices into `ids`."""
        if context not in self._spans_of:
            least = MIN_CONTEXTS * context
            starts: list[int] = []
            for start in self.starts.tolist():
                if not starts or start - starts[-1] >= least:
                    starts.append(start)
            if len(starts) > 1 and len(self) - starts[-1] < least:
                del starts[-1]
            stops = [*starts, len(self)][1:]
            self._spans_of[context] = np.array(starts), np.array(stops)
        return self._spans_of[context]


def _pair(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of T + 1 ids -> inputs (B, T) and targets (B, T)."""
    stacked = torch.stack(rows)
    return stacked[:, :-1], stacked[:, 1:]


class Corpus:
    """Text files, each one document, split into training, validation and test text.

    Every file is split by characters, before tokenization: its beginning is for training, then
    comes the validation part, then the test part. Text is UTF-8 and not normalized in any way; only
    a byte order mark is removed.

    Args:
        path: a file, or a folder: its .txt and .md files at any depth, sorted.
        val_fraction, test_fraction: share of each file's characters; 0 means no such split.

    Raises:
        FileNotFoundError: no text file at `path`.
        ValueError: a file is not text, all files are empty, or the fractions are out of range.
    """

    def __init__(self, path: str | Path, val_fraction: float = 0.05, test_fraction: float = 0.05):
        if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} must be at least "
                "0, and their sum below 1"
            )
        self.fractions = (val_fraction, test_fraction)
        self.paths: list[Path] = []
        self._sizes: list[int] = []  # characters
        digest = hashlib.sha256()
        paths = text_files(Path(path))
        for file in progress(paths, "reading text", len(paths), "file"):
            if text := read_text(file):
                self.paths.append(file)
                self._sizes.append(len(text))
                digest.update(hashlib.sha256(text.encode()).digest())
        if not self.paths:
            raise ValueError(f"{path} contains no text: it is empty")
        self._digest = digest.hexdigest()

    def texts(self, split: str | None = None) -> Iterator[str]:
        """Each file's part that belongs to `split`; None means each whole file."""
        for path, size in zip(self.paths, self._sizes, strict=True):
            start, stop = (0, size) if split is None else self._range(split, size)
            if start < stop:
                yield read_text(path)[start:stop]

    def _range(self, split: str, size: int) -> tuple[int, int]:
        """Start and stop of `split` in a file of `size` characters."""
        val, test = self.fractions
        # 1e-6 against rounding: 1 - 0.1 of 10 characters is 9.
        stops = [int(size * (1 - val - test) + 1e-6), int(size * (1 - test) + 1e-6), size]
        i = SPLITS.index(split)
        return (0, *stops)[i], stops[i]

    def tokenized(self, tokenizer_path: Path, folder: Path) -> dict[str, Split]:
        """The splits with a fraction above 0, as token ids in a subfolder of `folder`.

        A file's first id is BOS and its last EOS, if the tokenizer has them. The subfolder is named
        by `key`; if it exists it is read, not written again. Several processes may call this at
        once, but then each encodes.

        Raises:
            ValueError: the tokenizer lacks a character.
            OSError: the disk is full.
        """
        cache = folder / self.key(tokenizer_path)
        if not cache.exists():
            try:
                with new_folder(cache) as tmp:
                    self._write(Tokenizer(tokenizer_path), tmp)
            except FileExistsError:  # another process was faster
                pass
        return {name: _open_split(cache, name) for name in SPLITS if self._has(name)}

    def _has(self, split: str) -> bool:
        return split == "train" or self.fractions[split == "test"] > 0

    def key(self, tokenizer_path: Path) -> str:
        """A digest of the texts, the fractions and the tokenizer."""
        digest = hashlib.sha256(f"{FORMAT} {self.fractions} {self._digest}".encode())
        for path in (tokenizer_path, Path(f"{tokenizer_path}.json")):
            content = path.read_bytes() if path.is_file() else b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()[:16]

    def _write(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Write SPLIT.bin for each split, and index.json: dtype, sizes, starts of documents."""
        dtype = np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<u4")
        starts: dict[str, list[int]] = {name: [] for name in SPLITS}
        sizes = dict.fromkeys(SPLITS, 0)
        ranges = (self._range(name, size) for name in SPLITS for size in self._sizes)
        total = sum(-((start - stop) // PASSAGE) for start, stop in ranges)
        with ExitStack() as stack:
            paths = {name: folder / f"{name}.bin" for name in SPLITS}
            files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
            for name, is_first, ids in progress(self._encoded(tokenizer), "encoding", total):
                if is_first:
                    starts[name].append(sizes[name])
                sizes[name] += len(ids)
                files[name].write(np.array(ids, dtype).tobytes())
        index = {"dtype": dtype.str, "sizes": sizes, "starts": starts}
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")

    def _encoded(self, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, list[int]]]:
        """For each passage: its split, whether it is the first of a document there, its ids."""
        for path, size in zip(self.paths, self._sizes, strict=True):
            text, position = read_text(path), 0
            for name in SPLITS:
                start, stop = self._range(name, size)
                is_first = True
                for passage in passages(text[start:stop], PASSAGE):
                    bos, position = position == 0, position + len(passage)
                    try:
                        ids = tokenizer.encode(passage, bos=bos, eos=position == size)
                    except ValueError as e:
                        raise ValueError(
                            f"{path}: {e}, or use a tokenizer that has it, such as char"
                        ) from None
                    yield name, is_first, ids
                    is_first = False


def _open_split(folder: Path, name: str) -> Split:
    path = folder / f"{name}.bin"
    try:
        index = read_json(folder / "index.json")
        kind, size, starts = index["dtype"], index["sizes"][name], [*index["starts"][name]]
        intact = kind in ("<u2", "<u4") and [0, *starts, size] == sorted([0, *starts, size])
        intact = intact and path.stat().st_size == size * np.dtype(kind).itemsize
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged; delete the folder {folder} and start again")
    ids = np.memmap(path, kind, "r") if size else np.empty(0, kind)
    return Split(name, ids, np.array(starts, np.int64))


def text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no text at {path}; give a file, or a folder of .txt or .md files")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise FileNotFoundError(f"no .txt or .md file in {path}; give a text file or its folder")
    return found


def read_text(path: Path) -> str:
    """A file's text; ValueError if it is not UTF-8 or has a NUL byte."""
    content = path.read_bytes()
    remedy = "convert it to UTF-8 text, or leave it out"
    if (nul := content.find(0)) >= 0:
        raise ValueError(f"{path}, byte {nul}: NUL, as in binary files and UTF-16; {remedy}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        i = content.index(e.object) + e.start  # e.object lacks the byte order mark
        raise ValueError(f"{path}, byte {i}: 0x{content[i]:02x} is not UTF-8; {remedy}") from None
