"""Text files -> ids on disk -> batches. Knows no model.

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

from llama.common.files import new_folder
from llama.common.progress import progress
from llama.text.long_text import passages
from llama.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".md")
FORMAT = 1  # of the files that `Corpus.tokenized` writes
PASSAGE = 1 << 20  # characters encoded at a time
LONG = 8  # contexts: a stretch of text that windows stay inside has so many


class Split:
    """The ids of one part of a corpus, and the windows of them that a model sees.

    A window stays inside one document, but documents shorter than 8 contexts are joined with the
    next (the last with those before), the end and begin tokens between them.

    Args:
        name: in messages.
        ids: one dimension, in memory or mapped.
        starts: where in `ids` each document begins, the first at 0.
    """

    def __init__(self, name: str, ids: np.ndarray, starts: np.ndarray):
        self.name = name
        self.ids = ids
        self.starts = starts
        self._spans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, context: int) -> None:
        """Raise a ValueError unless there is a window of `context` ids and the one after it."""
        if len(self) > context:
            return
        flag = {"validation": "--val_fraction", "test": "--test_fraction"}.get(self.name)
        remedy = f", a larger {flag} (or 0)" if flag else ""
        raise ValueError(
            f"the {self.name} split has {len(self)} tokens, and one window needs {context + 1}, "
            f"max_seq_len and one; give more text, a smaller --max_seq_len{remedy}"
        )

    def batch(
        self, step: int, batch_size: int, context: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Random windows (B, T) and the ids that follow each of theirs (B, T), int64.

        They depend on the arguments alone, so resuming needs no state. `world` ranks draw the rows
        of one batch of `world * batch_size`, each its own.

        Raises:
            ValueError: the split is shorter than a window; no such rank.
        """
        self.check(context)
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}; ranks count from 0")
        begins, ends = self._joined(context)
        before = np.cumsum(np.maximum(ends - begins - context, 0))  # windows up to each span's end
        draws = np.random.default_rng([seed, step]).integers(before[-1], size=world * batch_size)
        draws = draws[rank * batch_size : (rank + 1) * batch_size]
        span = np.searchsorted(before, draws, side="right")
        first = ends[span] - context - (before[span] - draws)
        rows = torch.from_numpy(self.ids[first[:, None] + np.arange(context + 1)].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    def windows(
        self, context: int, batch_size: int = 1, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows in order, none overlapping: `batch` of up to `batch_size` rows at a time.

        Each id but the first of a document (or of those joined) is predicted once. Shorter windows,
        at the ends, come alone.

        Args:
            most: of more windows, take every second, third, ..., so that no more than these are
                left. None is all.
        """
        begins, ends = self._joined(context)
        counts = -((begins - ends + 1) // context)  # windows of each span
        every = 1 if most is None else max(1, -(-int(counts.sum()) // most))
        before = 0  # windows, in the spans before
        rows: list[Tensor] = []
        for begin, end, count in zip(begins, ends, counts, strict=True):
            first = begin + (-before % every) * context
            before += count
            for i in range(first, end - 1, every * context):
                window = self.ids[i : min(i + context + 1, end)].astype(np.int64)
                rows.append(torch.from_numpy(window))
                short = len(window) <= context
                if short and len(rows) > 1:
                    yield _pair(rows[:-1])
                if short or len(rows) == batch_size:
                    yield _pair(rows[-1:] if short else rows)
                    rows = []
        if rows:
            yield _pair(rows)

    def _joined(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Begins and ends of the stretches that windows stay inside."""
        if context not in self._spans:
            begins: list[int] = []
            last = -LONG * context
            for start in self.starts.tolist():
                if start - last >= LONG * context:
                    begins.append(start)
                    last = start
            if len(begins) > 1 and len(self) - begins[-1] < LONG * context:
                del begins[-1]
            ends = [*begins, len(self)][1:]
            self._spans[context] = np.array(begins), np.array(ends)
        return self._spans[context]


def _pair(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(rows)
    return stacked[:, :-1], stacked[:, 1:]


class Corpus:
    """Text files, each a document: its beginning is trained on, what follows is held out.

    Each file is cut by characters, before any tokenization: first training, then validation, then
    test. The text is read as it stands, UTF-8, but for a byte order mark.

    Args:
        path: a file, or a folder: its .txt and .md files at any depth, sorted.
        val_fraction, test_fraction: of each file's characters; 0 is no such split.

    Raises:
        FileNotFoundError: nothing to read there.
        ValueError: a file that is not text, no text at all, or impossible fractions.
    """

    def __init__(self, path: str | Path, val_fraction: float = 0.05, test_fraction: float = 0.05):
        if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"validation {val_fraction} and test {test_fraction} must be fractions from 0 on "
                "that leave some text to train on"
            )
        self.fractions = (val_fraction, test_fraction)
        self.paths: list[Path] = []
        self._sizes: list[int] = []  # characters
        digest = hashlib.sha256()
        paths = _text_files(Path(path))
        for file in progress(paths, "reading text", len(paths), "file"):
            if text := _read(file):
                self.paths.append(file)
                self._sizes.append(len(text))
                digest.update(hashlib.sha256(text.encode()).digest())
        if not self.paths:
            raise ValueError(f"{path} holds no text: it is empty")
        self._digest = digest.hexdigest()

    def texts(self, split: str | None = None) -> Iterator[str]:
        """Each file's part in `split`; None: each whole."""
        for path, size in zip(self.paths, self._sizes, strict=True):
            start, stop = (0, size) if split is None else self._part(split, size)
            if start < stop:
                yield _read(path)[start:stop]

    def _part(self, split: str, size: int) -> tuple[int, int]:
        """Where in a file of `size` characters `split` begins and ends."""
        val, test = self.fractions
        # A hair above, so that 1 - 0.1 of 10 characters is 9.
        stops = [int(size * (1 - val - test) + 1e-6), int(size * (1 - test) + 1e-6), size]
        i = SPLITS.index(split)
        return (0, *stops)[i], stops[i]

    def tokenized(self, tokenizer_path: Path, folder: Path) -> dict[str, Split]:
        """The splits that have a fraction, as ids; encoded once and kept in `folder`.

        The first id of a file is BOS and its last EOS, where the tokenizer has them. What lies in
        `folder` is used again as long as texts, fractions and tokenizer stay the same. It may be
        called by several processes at once, though one before the others saves work.

        Raises:
            ValueError: a character that the tokenizer lacks.
            OSError: the disk is full.
        """
        kept = folder / self.key(tokenizer_path)
        if not kept.exists():
            try:
                with new_folder(kept) as tmp:
                    self._write(Tokenizer(tokenizer_path), tmp)
            except FileExistsError:  # another process was faster
                pass
        return {name: _open_split(kept, name) for name in SPLITS if self._has(name)}

    def _has(self, split: str) -> bool:
        return split == "train" or self.fractions[split == "test"] > 0

    def key(self, tokenizer_path: Path) -> str:
        """The name of what `tokenized` makes of these texts, fractions and tokenizer."""
        digest = hashlib.sha256(f"{FORMAT} {self.fractions} {self._digest}".encode())
        for path in (tokenizer_path, Path(f"{tokenizer_path}.json")):
            content = path.read_bytes() if path.is_file() else b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()[:16]

    def _write(self, tokenizer: Tokenizer, folder: Path) -> None:
        """One file of ids a split, and where documents start in each."""
        dtype = np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<u4")
        starts: dict[str, list[int]] = {name: [] for name in SPLITS}
        sizes = dict.fromkeys(SPLITS, 0)
        parts = (self._part(name, size) for name in SPLITS for size in self._sizes)
        total = sum(-((start - stop) // PASSAGE) for start, stop in parts)
        with ExitStack() as stack:
            paths = {name: folder / f"{name}.bin" for name in SPLITS}
            files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
            for name, begins, ids in progress(self._encoded(tokenizer), "encoding", total):
                if begins:
                    starts[name].append(sizes[name])
                sizes[name] += len(ids)
                files[name].write(np.array(ids, dtype).tobytes())
        index = {"dtype": dtype.str, "sizes": sizes, "starts": starts}
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")

    def _encoded(self, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, list[int]]]:
        """(split, whether a document's part in it begins here, ids) of a passage after another."""
        for path, size in zip(self.paths, self._sizes, strict=True):
            text, at = _read(path), 0
            for name in SPLITS:
                start, stop = self._part(name, size)
                begins = True
                for passage in passages(text[start:stop], PASSAGE):
                    bos, at = at == 0, at + len(passage)
                    try:
                        ids = tokenizer.encode(passage, bos=bos, eos=at == size)
                    except ValueError as e:
                        raise ValueError(
                            f"{path}: {e}, or use a tokenizer that knows it, such as char"
                        ) from None
                    yield name, begins, ids
                    begins = False


def _open_split(folder: Path, name: str) -> Split:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    path, dtype, size = folder / f"{name}.bin", np.dtype(index["dtype"]), index["sizes"][name]
    if path.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{path} is damaged; remove the folder {folder} and start again")
    ids = np.memmap(path, dtype, "r") if size else np.empty(0, dtype)
    return Split(name, ids, np.array(index["starts"][name], np.int64))


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no text at {path}; give a file, or a folder of .txt or .md files")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise FileNotFoundError(f"no .txt or .md file in {path}; give a text file or its folder")
    return found


def _read(path: Path) -> str:
    """A file's text.

    Raises:
        ValueError: it is not UTF-8, or has a NUL byte.
    """
    content = path.read_bytes()
    remedy = "convert it to UTF-8 text, or leave it out"
    if (nul := content.find(0)) >= 0:
        raise ValueError(f"{path}, byte {nul}: a NUL, as in binary files and UTF-16; {remedy}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        at = content.index(e.object) + e.start  # which lacks a byte order mark
        raise ValueError(f"{path}, byte {at}: 0x{content[at]:02x} is not UTF-8; {remedy}") from None
