"""data.py against plain Python code on the same text."""

from __future__ import annotations

import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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


def numbered(lengths: list[int]) -> Split:
    """A split with documents of these lengths; its ids are 0, 1, 2, ..."""
    starts = np.cumsum([0, *lengths])[:-1]
    return Split("train", np.arange(sum(lengths), dtype=np.uint16), starts)


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
        fractions = {"val_fraction": percent / 100, "test_fraction": 0.4}
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


def test_batch_rows_are_windows_of_the_text() -> None:
    split = numbered([5000])
    x, y = split.batch(step=3, batch_size=7, context=20)
    assert x.shape == y.shape == (7, 20) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x, x[:, :1] + torch.arange(20)) and torch.equal(y, x + 1)


def test_batch_depends_on_seed_and_step_alone() -> None:
    first, again = numbered([5000]), numbered([5000])
    steps = {step: first.batch(step, 4, 16, seed=1) for step in range(10)}
    for step in (7, 2, 9):  # in any order
        assert all(map(torch.equal, again.batch(step, 4, 16, seed=1), steps[step]))
    starts = {tuple(x[:, 0].tolist()) for x, _ in steps.values()}
    others = {tuple(first.batch(step, 4, 16, seed=2)[0][:, 0].tolist()) for step in range(10)}
    assert len(starts | others) == 20


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_parts_are_one_batch(n: int) -> None:
    split = numbered([300, 40, 20, 4000, 7])
    whole = split.batch(5, 24, 10, seed=3)
    parts = [split.batch(5, 24 // n, 10, seed=3, part=i, parts=n) for i in range(n)]
    for expected, got in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(expected, torch.cat(got))


def test_windows_are_drawn_uniformly() -> None:
    split = numbered([90, 33, 5, 5, 200])
    context = 4  # 8 contexts are 32 ids: both documents of 5 join the last one
    allowed = [*range(90 - 4), *range(90, 123 - 4), *range(123, 333 - 4)]
    x, _ = split.batch(0, 100_000, context)
    counts = torch.bincount(x[:, 0], minlength=333)
    assert counts.nonzero().flatten().tolist() == allowed
    mean = 100_000 / len(allowed)
    assert (counts[allowed] - mean).abs().max() < 6 * mean**0.5


def spans(lengths: list[int], least: int) -> list[list[int]]:
    """Ids of the spans: short documents are joined with the next, the last with the previous."""
    out: list[list[int]] = []
    at = 0
    for n in lengths:
        ids = list(range(at, at + n))
        at += n
        if out and len(out[-1]) < least:
            out[-1] += ids
        else:
            out.append(ids)
    if len(out) > 1 and len(out[-1]) < least:
        out[-2:] = [out[-2] + out[-1]]
    return out


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 60), max_size=12), st.integers(1, 9), st.integers(1, 5), st.integers()
)
def test_windows_cover_each_span_once(
    lengths: list[int], context: int, batch_size: int, step: int
) -> None:
    split = numbered(lengths)
    expected = []
    for span in spans(lengths, 8 * context):
        for i in range(0, len(span) - 1, context):
            expected.append(span[i : i + context + 1])
    got, sizes = [], []
    for x, y in split.windows(context, batch_size):
        assert x.shape == y.shape and len(x) <= batch_size and x.dtype == torch.int64
        sizes.append(len(x))
        got += [[*a, b[-1]] for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        assert torch.equal(x[:, 1:], y[:, :-1])
    assert got == expected
    for most in (1, 3, 7):
        few = list(split.windows(context, batch_size, most))
        some = [[*a, b[-1]] for x, y in few for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        assert some == expected[:: -(-len(expected) // most) or 1] and len(some) <= most
    if split.ids.size > context:
        inside = {
            tuple(s[i : i + context]) for s in spans(lengths, 8 * context) for i in range(999)
        }
        x, _ = split.batch(abs(step), 20, context)
        assert {tuple(row) for row in x.tolist()} <= inside


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
