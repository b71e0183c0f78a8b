"""learn_tokenizer.py against the `tokenizers` library and plain Python code."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from llama.checkpoints.formats.hf_tokenizer_export import write_tokenizer
from llama.checkpoints.formats.hf_tokenizer_import import read_vocabulary
from llama.tokenizer import Tokenizer
from llama.train.learn_tokenizer import learn
from tests.test_tokenizer import random_text

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"
LLAMA3_PATTERN = (  # as in llama-models
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROSE = (
    "The quick brown fox's 12345 lazy dogs; naïve café, 漢字かな 😀🎉!\n\n  def f(x):\n\treturn x\n"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]


def mixed_texts(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    texts = [random_text(rng).encode(errors="replace").decode() for _ in range(n)]
    return [PROSE * 3, *texts]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.randoms())
@example("\r\n\t \u2028\x85 é漢😀e\u0301<|end_of_text|>", random.Random(0))
def test_every_character_is_one_token(text: str, rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        t = Tokenizer(learn("char", [text[:3], text[3:]], [], Path(folder)))
    alphabet = sorted(set(text))
    assert t.n_words == len(alphabet) + 3
    shuffled = "".join(rng.choices(alphabet, k=50))
    for s in (text, shuffled):
        ids = t.encode(s, bos=True, eos=True)
        assert ids == [t.bos_id, *(alphabet.index(c) for c in s), t.eos_id]
        assert t.decode(ids[1:-1]) == s


def test_special_tokens(tmp_path: Path) -> None:
    for kind, n in (("char", 2), ("bpe:300", 297)):
        t = Tokenizer(learn(kind, ["ab"], [PROSE * 9], tmp_path))
        assert t.special_tokens == {text: n + i for i, text in enumerate(SPECIAL)}
        assert (t.bos_id, t.eos_id, t.pad_id, t.stop_tokens) == (n, n + 1, n + 2, [n + 1])
        assert t.chat_format is None and t.n_words == n + 3


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"no {SHAKESPEARE}")
def test_tiny_shakespeare(tmp_path: Path) -> None:
    text = SHAKESPEARE.read_text(encoding="utf-8")
    t = Tokenizer(learn("char", [text], [], tmp_path))
    assert t.n_words == 65 + 3
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    assert t.encode(text, bos=False, eos=False) == [alphabet[c] for c in text]


@pytest.mark.parametrize("text", ["qé", "q字x", "q😀", "q\ud83d", "qz", "q\ufffd"])
def test_unknown_character(text: str, tmp_path: Path) -> None:
    t = Tokenizer(learn("char", ["q?x è漢👍\n"], [], tmp_path))
    named = "\ufffd" if text == "q\ud83d" else text[1]
    with pytest.raises(ValueError, match=f"lacks '{named}'"):
        t.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("size", [259, 300, 700])
def test_ids_equal_those_of_the_library(size: int, tmp_path: Path) -> None:
    training = mixed_texts(0, 400)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 3, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(training, trainer)
    t = Tokenizer(learn(f"bpe:{size}", [], training, tmp_path))
    assert t.n_words == size
    for text in mixed_texts(1, 1000):
        ids = t.encode(text, bos=False, eos=False)
        assert ids == library.encode(text).ids
        assert t.decode(ids) == text


def test_huge_words_are_cut_for_the_trainer(tmp_path: Path) -> None:
    """A word of 3,000 characters is three words; the split pattern of the file stays Llama 3's."""
    t = Tokenizer(learn("bpe:270", [], ["a" * 3000 + "\n"], tmp_path))
    assert t.pat_str == LLAMA3_PATTERN
    assert 500 <= max(map(len, t.ranks)) <= 1000
    text = "a" * 5000
    assert t.decode(t.encode(text, bos=False, eos=False)) == text


def test_a_signal_ends_the_training_of_a_tokenizer(tmp_path: Path) -> None:
    """While the library runs, which does not return to Python."""
    rng = random.Random(0)
    words = (" ".join("".join(rng.choices("abcdef", k=900)) for _ in range(30)) for _ in range(60))
    code = (
        "import os, signal, sys, threading; from pathlib import Path\n"
        "from llama.train import learn_tokenizer\n"
        "passages = learn_tokenizer._passages\n"
        "def last(texts):\n"
        "    yield from passages(texts)\n"
        "    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "learn_tokenizer._passages = last\n"
        "text = Path(sys.argv[1]).read_text()\n"
        "learn_tokenizer.learn('bpe:30000', [], [text], Path(sys.argv[2]))\n"
    )
    (tmp_path / "text").write_text(" ".join(words))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "text"), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt", done.stderr
    assert done.returncode == -signal.SIGINT and not (tmp_path / "out").exists()


def test_an_error_while_reading_is_raised(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield PROSE
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        learn("bpe:300", [], texts(), tmp_path)


def test_bytes_encode_all_unicode(tmp_path: Path) -> None:
    t = Tokenizer(learn("bpe:270", [], [PROSE * 9], tmp_path))
    for text in mixed_texts(2, 200):
        assert t.decode(t.encode(text, bos=False, eos=False)) == text


@pytest.mark.parametrize("kind", ["char", "bpe:400"])
def test_the_same_text_gives_the_same_files(kind: str, tmp_path: Path) -> None:
    texts = mixed_texts(3, 200)
    first, second = (learn(kind, texts, texts, tmp_path / name) for name in "ab")
    for end in ("", ".json"):
        assert Path(f"{first}{end}").read_bytes() == Path(f"{second}{end}").read_bytes()
    assert sorted(p.name for p in first.parent.iterdir()) == [
        "tokenizer.model",
        "tokenizer.model.json",
    ]


@pytest.mark.parametrize("kind", ["char", "bpe:400"])
def test_hugging_face_round_trip(kind: str, tmp_path: Path) -> None:
    """Also where a character of several bytes is a token and its bytes are not."""
    texts = mixed_texts(4, 200)
    path = learn(kind, texts, texts, tmp_path / "ours")
    ours = Tokenizer(path)
    write_tokenizer(ours, tmp_path, 64)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts:
        if not any(special in text for special in SPECIAL):  # theirs encodes them as specials
            ids = theirs.encode(text).ids
            assert ids == ours.encode(text, bos=True, eos=False)
            assert theirs.decode(ids) == text
    sidecar = json.loads(Path(f"{path}.json").read_text("utf-8"))
    assert read_vocabulary(tmp_path) == (path.read_bytes(), sidecar)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bpe:258", "at least 259"),
        ("bpe:", "at least 259"),
        ("bpe:-1", "at least 259"),
        ("bpe:1e3", "at least 259"),
        ("bpe:5000", r"no more than (\d+) tokens; use bpe:\1 or less"),
        ("chars", "no tokenizer 'chars'; use char, bpe:N"),
    ],
)
def test_unknown_kinds(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        learn(kind, [PROSE], [PROSE], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_error_names_the_largest_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use bpe:") as e:
        learn("bpe:5000", [], [PROSE], tmp_path)
    size = int(str(e.value).split("bpe:")[1].split()[0])
    assert Tokenizer(learn(f"bpe:{size}", [], [PROSE], tmp_path)).n_words == size
    with pytest.raises(ValueError, match="no more than"):
        learn(f"bpe:{size + 1}", [], [PROSE], tmp_path)


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        learn("char", [""], [""], tmp_path)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e .*\[train\]"):
        learn("bpe:300", [PROSE], [PROSE], tmp_path)


def test_copying_a_tokenizer(llama3_tokenizer_path: Path, tmp_path: Path) -> None:
    source = learn("bpe:300", [], [PROSE * 9], tmp_path / "source")
    path = learn(str(source), [], [], tmp_path / "out")
    for end in ("", ".json"):
        assert Path(f"{path}{end}").read_bytes() == Path(f"{source}{end}").read_bytes()
    assert learn(str(path), [], [], tmp_path / "out") == path  # onto itself
    assert path.read_bytes() == source.read_bytes()
    learn(str(llama3_tokenizer_path), [], [], tmp_path / "out")  # it has no sidecar
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.model"]
    assert path.read_bytes() == llama3_tokenizer_path.read_bytes()


def test_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no ranks\n")
    with pytest.raises(ValueError, match="not a tiktoken rank file"):
        learn(str(tmp_path / "text.txt"), [], [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
