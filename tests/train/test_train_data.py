"""`Corpus` of data.py against plain Python code on the same text."""

from __future__ import annotations

import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.long_text import passages
from llama.tokenizer import Tokenizer
from llama.train import data
from llama.train.data import SPLITS, Corpus, Split
from llama.train.learn_tokenizer import learn
from tests.test_tokenizer import random_text

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"
# The split patterns of GPT-2 and of a character vocabulary.
PATTERNS = [
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[\s\S]",
]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def poem(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices("abcdefg hé漢\n", k=n))


def open_corpus(
    folder: Path, files: dict[str, str], kind: str = "char", **fractions: float
) -> tuple[Corpus, Tokenizer, dict[str, Split]]:
    corpus = Corpus(write(folder / "texts", files), **fractions)
    path = learn(kind, corpus.texts(), corpus.texts("train"), folder)
    return corpus, Tokenizer(path), corpus.tokenized(path, folder / "data")


@pytest.mark.parametrize("kind", ["char", "bpe:280"])
def test_each_file_is_split_in_three(kind: str, tmp_path: Path) -> None:
    files = {"b.txt": poem(0, 1000), "a.md": poem(1, 333), "sub/c.TXT": poem(2, 7)}
    files |= {"d.txt": "", "e.py": "not text"}
    corpus, t, splits = open_corpus(tmp_path, files, kind)
    assert [p.name for p in corpus.paths] == ["a.md", "b.txt", "c.TXT"]
    expected: dict[str, list[int]] = {name: [] for name in SPLITS}
    for name in ("a.md", "b.txt", "sub/c.TXT"):
        text, n = files[name], len(files[name])
        cuts = [0, n * 90 // 100, n * 95 // 100, n]
        ids = [t.encode(text[i:j], bos=False, eos=False) for i, j in zip(cuts, cuts[1:])]  # noqa: B905, RUF007
        ids = [[t.bos_id, *ids[0]], ids[1], [*ids[2], t.eos_id]]
        for split, part in zip(SPLITS, ids, strict=True):
            expected[split] += part
    assert {name: split.ids.tolist() for name, split in splits.items()} == expected


@pytest.mark.parametrize(
    ("fractions", "cuts"),
    [((0.1, 0), (9, 10)), ((0, 0), (10, 10)), ((0, 0.3), (7, 7)), ((0.2, 0.1), (7, 9))],
)
def test_fractions(fractions: tuple[float, float], cuts: tuple[int, int], tmp_path: Path) -> None:
    text = "0123456789"
    corpus = Corpus(write(tmp_path, {"a.txt": text}), *fractions)
    parts = ["".join(corpus.texts(name)) for name in SPLITS]
    assert parts == [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]
    path = learn("char", corpus.texts(), [], tmp_path)
    has = {"train"} | {n for n, f in zip(SPLITS[1:], fractions, strict=True) if f}
    assert set(corpus.tokenized(path, tmp_path / "data")) == has


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"no {SHAKESPEARE}")
def test_tiny_shakespeare(tmp_path: Path) -> None:
    corpus = Corpus(SHAKESPEARE, 0.1, 0)
    path = learn("char", corpus.texts(), corpus.texts("train"), tmp_path)
    splits = corpus.tokenized(path, tmp_path / "data")
    text = SHAKESPEARE.read_bytes().decode()
    cut = int(len(text) * 0.9)  # where nanoGPT cuts
    t = Tokenizer(path)
    assert t.decode(splits["train"].ids[1:].tolist()) == text[:cut]
    assert t.decode(splits["validation"].ids[:-1].tolist()) == text[cut:]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(0, 40))
def test_any_text_round_trips(text: str, percent: int) -> None:
    if text[0] == "\ufeff" or "\0" in text:
        return
    with tempfile.TemporaryDirectory() as name:
        fractions: dict[str, Any] = {"val_fraction": percent / 100, "test_fraction": 0.4}
        _, t, splits = open_corpus(Path(name), {"a.txt": text}, **fractions)
        ids = [i for name in SPLITS if name in splits for i in splits[name].ids.tolist()]
        assert ids[0] == t.bos_id and ids[-1] == t.eos_id and t.decode(ids[1:-1]) == text
        train = splits["train"].ids.tolist()
        cut = len(text) * (60 - percent) // 100
        assert train == ([t.bos_id] if cut else []) + t.encode(text[:cut], bos=False, eos=False)


def test_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    corpus = Corpus(write(tmp_path, {"a.txt": "\ufeffone\r\ntwo\n"}))
    assert list(corpus.texts()) == ["one\r\ntwo\n"]


@pytest.mark.parametrize("pattern", [None, *PATTERNS])
def test_passages_encode_like_the_whole_text(
    pattern: str | None, llama3_tokenizer_path: Path
) -> None:
    content = llama3_tokenizer_path.read_bytes()
    sidecar = {"pat_str": pattern} if pattern else {}
    t = Tokenizer.from_vocabulary(content, sidecar, "ranks")
    rng = random.Random(0)
    cuts = 0
    for _ in range(300):
        text = " ".join(random_text(rng) for _ in range(20)).encode(errors="replace").decode()
        parts = list(passages(text, rng.randint(1, 60)))
        cuts += len(parts) - 1
        ids = [i for part in parts for i in t.encode(part, bos=False, eos=False)]
        assert ids == t.encode(text, bos=False, eos=False)
    assert cuts > 1000


def test_a_long_text_is_encoded_in_passages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PASSAGE", 10)
    files = {"a.txt": poem(0, 5000), "b.txt": poem(1, 100)}
    _, t, splits = open_corpus(tmp_path, files, "bpe:300", val_fraction=0, test_fraction=0)
    ids = [t.encode(text, bos=True, eos=True) for text in files.values()]
    assert splits["train"].ids.tolist() == ids[0] + ids[1]
    assert splits["train"].starts.tolist() == [0, len(ids[0])]


def test_cache_is_used_until_an_input_changes(tmp_path: Path) -> None:
    files = {"a.txt": poem(0, 900), "b.txt": poem(1, 300)}
    open_corpus(tmp_path, files)

    def cached() -> set[str]:
        return {p.name for p in (tmp_path / "data").iterdir()}

    [first] = cached()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "data" / first).iterdir()}
    _, _, splits = open_corpus(tmp_path, files)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data" / first).iterdir()} == times
    assert isinstance(splits["train"].ids, np.memmap) and not splits["train"].ids.flags.writeable
    for changes in (
        {"files": files | {"a.txt": poem(2, 900)}},
        {"files": files | {"a.txt": files["a.txt"] + files["b.txt"][:1]}},
        {"kind": "bpe:300"},
        {"val_fraction": 0.1},
        {"test_fraction": 0.1},
    ):
        before = cached()
        options: dict[str, Any] = {"files": files} | changes
        open_corpus(tmp_path, **options)
        assert len(cached() - before) == 1
    (tmp_path / "texts" / "b.txt").rename(tmp_path / "texts" / "0.txt")  # another order
    (tmp_path / "texts" / "a.txt").rename(tmp_path / "texts" / "1.txt")
    before = cached()
    open_corpus(tmp_path, {})
    assert len(cached() - before) == 1


def test_several_processes_may_encode_at_once(tmp_path: Path) -> None:
    corpus = Corpus(write(tmp_path / "texts", {"a.txt": poem(0, 200_000)}))
    path = learn("char", corpus.texts(), [], tmp_path)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(corpus.tokenized, path, tmp_path / "data") for _ in range(4)]
        ids = [job.result()["train"].ids.tolist() for job in jobs]
    assert ids[0] == ids[1] == ids[2] == ids[3] and len(ids[0]) == 180_001
    assert len(list((tmp_path / "data").iterdir())) == 1


@pytest.mark.parametrize(("extra", "dtype"), [(0, "<u2"), (1, "<u4")])
def test_dtype_of_ids(extra: int, dtype: str, tmp_path: Path) -> None:
    characters = [chr(i) for i in range(0x10000, 0x10000 + 65536 - 3 + extra)]
    text = "".join(characters)
    _, t, splits = open_corpus(tmp_path, {"a.txt": text}, val_fraction=0, test_fraction=0)
    assert t.n_words == 65536 + extra and splits["train"].ids.dtype == np.dtype(dtype)
    assert splits["train"].ids.tolist() == [t.bos_id, *range(len(characters)), t.eos_id]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\0cd", r"a\.txt, byte 2: NUL"),
        (b"ab\xff", r"a\.txt, byte 2: 0xff is not UTF-8"),
        (b"\xef\xbb\xbfab\xff", r"a\.txt, byte 5: 0xff"),
        ("é".encode("latin-1"), r"a\.txt, byte 0: 0xe9"),
        ("text".encode("utf-16"), r"a\.txt, byte 3: NUL"),
        (b"", "texts contains no text: it is empty"),
        (b"\xef\xbb\xbf", "it is empty"),
    ],
)
def test_files_that_are_not_text(content: bytes, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "texts", {"a.txt": ""})
    (folder / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Corpus(folder)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text at .*missing; give a file"):
        Corpus(tmp_path / "missing")
    write(tmp_path, {"a.pdf": "x"})
    with pytest.raises(FileNotFoundError, match=r"no \.txt or \.md file in"):
        Corpus(tmp_path)
    assert list(Corpus(tmp_path / "a.pdf").texts()) == ["x"]  # any suffix, if it is named


@pytest.mark.parametrize("fractions", [(-0.1, 0), (0, -1), (0.5, 0.5), (float("nan"), 0)])
def test_fractions_out_of_range(fractions: tuple[float, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least 0, and their sum below 1"):
        Corpus(write(tmp_path, {"a.txt": "text"}), *fractions)


def test_a_split_shorter_than_a_window(tmp_path: Path) -> None:
    _, _, splits = open_corpus(tmp_path, {"a.txt": poem(0, 100)})
    splits["train"].check(90)
    for name, context in (("train", 91), ("validation", 5), ("test", 6)):
        with pytest.raises(
            ValueError, match=f"the {name} split has {context} tokens.*{context + 1} "
        ):
            splits[name].check(context)
    with pytest.raises(ValueError, match=r"validation split has 5 tokens.*larger --val_fraction"):
        splits["validation"].batch(0, 1, 64)
    with pytest.raises(ValueError, match="part must be from 0 to 1, not 2"):
        splits["train"].batch(0, 1, 8, part=2, parts=2)


def test_a_tokenizer_that_lacks_a_character(tmp_path: Path) -> None:
    path = learn("char", ["abc"], [], tmp_path)
    corpus = Corpus(write(tmp_path / "texts", {"a.txt": "abc" * 9, "b.txt": "abé"}))
    with pytest.raises(ValueError, match=r"b\.txt: this tokenizer's vocabulary lacks 'é'"):
        corpus.tokenized(path, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_damaged_ids(tmp_path: Path) -> None:
    corpus, _, _ = open_corpus(tmp_path, {"a.txt": poem(0, 100)})
    [cache] = (tmp_path / "data").iterdir()
    (cache / "train.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="damaged; delete the folder"):
        corpus.tokenized(tmp_path / "tokenizer.model", tmp_path / "data")
