"""Data files -> examples: JSON, JSON lines and text. Knows nothing about token ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama.common.printable import printable_line, quoted
from llama.common.progress import progress
from llama.text.openai_messages import FieldError
from llama.train.data import SUFFIXES, read_text, text_files
from llama.train.example_formats import DIALOGS, KEYS, KNOWN, NoAnswerError, read_row, recognise
from llama.train.examples import Conversation, Document, Example

FORMATS = ("auto", *KEYS)


def read_examples(
    paths: Sequence[str | Path], format: str = "auto", counts: Counter[str] | None = None
) -> list[Example]:
    """The examples of several files.

    A file is a JSON list, JSON lines, or with the suffix .txt or .md one document; a folder has
    such text files. Rows without anything to train are left out.

    Args:
        format: one of FORMATS. "auto": each file's own, by the keys of its rows.
        counts: is increased by how many rows are left out, and how many turns, by reason.

    Raises:
        FileNotFoundError: no file at a path.
        ValueError: a file cannot be read; the message names file, row and key. Or a row's format
            is another than its file's, or a file's has nothing in common with the others'.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; use one of {', '.join(FORMATS)}")
    counts = Counter() if counts is None else counts
    examples: list[Example] = []
    used: dict[str, Path] = {}  # format: the first file of it
    for path in _files(paths):
        name = format
        if format in ("auto", "text") and _is_text(path, format):
            name, text = "text", read_text(path)
            if text.strip():
                examples.append(Document(str(path), text))
            else:
                counts["empty text"] += 1
        else:
            name = _read_file(path, format, examples, counts)
        used.setdefault(name, path)
        _check_together(used)
    if not examples:
        left_out = ", ".join(f"{n} with {reason}" for reason, n in counts.items())
        named = printable_line(", ".join(map(str, paths)))
        raise ValueError(
            f"{named}: nothing to train on" + (f" ({left_out})" if left_out else "; give more data")
        )
    return examples


def _files(paths: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; give a data file, or a folder of texts"
            )
        found += text_files(path)
    return list(dict.fromkeys(found))


def _is_text(path: Path, format: str) -> bool:
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or (format == "text" and suffix not in (".json", ".jsonl", ".ndjson"))


def _check_together(used: dict[str, Path]) -> None:
    """Check that formats are all of dialogs, or one."""
    kinds = {"dialogs" if name in DIALOGS else name for name in used}
    if len(kinds) > 1:
        (one, first), *_, (other, second) = used.items()
        raise ValueError(
            f"{first} has the format {one}, and {second} {other}; train on them one after the other"
        )


def _read_file(path: Path, format: str, examples: list[Example], counts: Counter[str]) -> str:
    """Append a JSON file's examples; return its format."""
    name = format
    rows = _rows(path)
    for where, row in progress(rows, f"reading {path.name}", unit="row"):
        found = recognise(row)
        if name == "auto":
            if found is None:
                raise ValueError(f"{where}: {_unknown(row)}")
            name = found
        if found not in (name, None) and not set(KEYS[name]) <= set(row):
            key = KEYS[str(found)][0]
            raise ValueError(
                f"{where}: key {key!r} of the format {found}, but the file's format is {name}; "
                f"put rows of one format into a file. Formats and their keys: {KNOWN}"
            )
        try:
            example = read_row(row, name, where)
        except NoAnswerError as e:
            counts[str(e)] += 1
            continue
        except FieldError as e:
            at = "" if e.path in str(e) else f"{e.path}: "
            raise ValueError(f"{where}: {at}{e}") from None
        if isinstance(example, Conversation) and example.dropped_turns:
            counts["turns before the first user's"] += example.dropped_turns
        examples.append(example)
    return name


def _unknown(row: Any) -> str:
    if not isinstance(row, dict):
        return f"a row must be an object, not {quoted(row)}"
    keys = printable_line(", ".join(map(repr, row)))[:300]
    return f"no known format has the keys {keys}; rename them. Formats and their keys: {KNOWN}"


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and row, value) of a JSON list, or of JSON lines."""
    text = read_text(path)
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        raise ValueError(
            f"{path} is neither JSON, nor named .txt or .md; for a text use --format text"
            if start
            else f"{path} is empty; leave it out"
        )
    if start == "{":
        first, _, rest = text.lstrip().partition("\n")
        if not rest.strip() or _is_json(first):
            yield from _lines(path, text)
            return
    value = _parse(path, text, 1)
    rows = value if isinstance(value, list) else [value]
    for i, row in enumerate(rows, 1):
        yield f"{path}, row {i}", row


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _parse(path, line, number)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(path: Path, text: str, line: int) -> Any:
    """The value of `text`, which begins in a line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{path}, line {line + e.lineno - 1}, column {e.colno}: not JSON ({e.msg}); correct it"
        ) from None
    except (ValueError, RecursionError) as e:  # a number of thousands of digits; deep nesting
        raise ValueError(f"{path}, line {line}: JSON that cannot be read ({e})") from None
