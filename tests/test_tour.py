"""The tour: its examples run, its links, pictures and numbers are right, both languages agree."""

from __future__ import annotations

import dataclasses
import doctest
import re
from base64 import b64encode
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from docs import figures, links
from llama import ModelArgs, Tokenizer, Transformer
from llama.checkpoints.footprint import Footprint
from llama.model import DotProductAttention, RMSNorm
from tests.test_layers import ROOT

ENGLISH, CHINESE = (page.read_text("utf-8") for page in links.PAGES)
LANGUAGES = pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["English", "Chinese"])
EXAMPLE = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"!\[[^\]]+\]\(figures/(\w+)\.svg\)")

# What somebody who changes the code asks, the section with the answer, and the answer's words.
QUESTIONS = [
    ("Can a user end a turn by typing <|eot_id|>?", 1, "ordinary characters", "按普通字符编码"),
    ("Who shares embedding and output?", 2, "Llama 3.2 1B and 3B do", "的 1B 和 3B 这样做"),
    ("Where do ranks exchange data?", 3, "sum after `wo` and `w2`", "`wo` 之后和 `w2` 之后"),
    ("How does a faster kernel enter the model?", 3, "modules are replaced", "替换模块"),
    ("Is RMSNorm's weight applied before the cast?", 4, "only then multiplied", "然后才乘以权重"),
    ("What does query head 5 of 8B read?", 5, "reads key-value head 1", "读取键值头 1"),
    ("What dtype has the rotation?", 6, "in fp32 and complex64", "在 fp32 和 complex64"),
    ("Why is freqs_cis not a buffer?", 6, "its imaginary part", "丢掉虚部"),
    ("params.json lacks the factor; what is it?", 7, "follows from the shape", "模型的形状决定"),
    ("Which parts of attention are in fp32?", 8, "the softmax in fp32", "softmax 用 fp32"),
    ("May the cache hold padding beyond a row's end?", 9, "anything finite", "可以是任何有限的数"),
    ("Are cached keys rotated?", 9, "stored after the rotation", "键在旋转之后存入缓存"),
    ("Why after the rotation?", 9, "on its own position only", "只取决于它自己的位置"),
    ("How wide is the feed-forward of 8B?", 10, "14,336", "14,336"),
    ("Does temperature change log-probabilities?", 11, "raw distribution", "取自原始分布"),
    ("What is the first token's log-probability?", 11, "first token has None", "分数是 None"),
    ("Is the token that crosses p in the nucleus?", 11, "is included, so", "也包括在内"),
    ("What does top_p = 0.5 keep?", 11, "0.5 the same two are kept", "0.5 时也保留这两个"),
    ("How is a limit added?", 11, "a field of [`Sampling`]", "先给 [`Sampling`]"),
    ("Which weights decay?", 12, "matrices only", "只作用于矩阵"),
]  # fmt: skip


def sections(page: str) -> list[str]:
    """The introduction, the twelve sections, and the end."""
    return re.split(r"^## ", page, flags=re.MULTILINE)


@pytest.mark.parametrize("section", sections(ENGLISH)[1:], ids=lambda text: text.split("\n")[0])
def test_examples_run(section: str) -> None:
    """Each section's examples need no other section."""
    blocks = EXAMPLE.findall(section)
    assert blocks
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "tour", None, 0)
    messages: list[str] = []
    assert doctest.DocTestRunner().run(test, out=messages.append).failed == 0, "".join(messages)


def test_languages_agree() -> None:
    """The Chinese examples are the English ones, and so are formulas, links, papers, pictures."""
    patterns = [EXAMPLE, re.compile(r"^\$\$.*\$\$$", re.MULTILINE), links.LINK, IMAGE]
    patterns += [re.compile(r"https://arxiv.org/abs/[\d.]+"), re.compile(r"\]\((\w+\.md.*?)\)")]
    pairs = list(zip(sections(ENGLISH), sections(CHINESE), strict=True))
    assert len(pairs) == 14
    for english, chinese in pairs:
        for pattern in patterns:
            found = [
                set(pattern.findall(text)) - {"tour.md", "tour.zh.md"}
                for text in (english, chinese)
            ]
            assert found[0] == found[1]


def test_a_piece_that_is_a_token_takes_its_id() -> None:
    """Though no merges lead to it."""
    tokens = [b"a", b"b", b"c", b"abc"]
    lines = [f"{b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    tokenizer = Tokenizer.from_vocabulary("\n".join(lines).encode(), {}, "example")
    assert tokenizer.encode("abc", bos=False) == [3]
    assert tokenizer.encode("abcb", bos=False) == [0, 1, 2, 1]


@LANGUAGES
def test_links_to_code_show_the_lines_of_their_name(page: str) -> None:
    found = links.LINK.findall(page)
    assert len(found) == len(re.findall(r"#L\d", page)) > 30
    assert page == links.linked(page), "run: python -m docs.notebook"
    for name, path, place in found:
        first, last = (int(line) for line in re.findall(r"\d+", place))
        lines = (ROOT / path).read_text("utf-8").splitlines()
        own = name.split(".")[-1]
        assert re.match(rf"\s*(def|class) {own}\b|{own} = ", lines[first - 1]), name
        indent = len(lines[first - 1]) - len(lines[first - 1].lstrip())
        rest = next((line for line in lines[last:] if line.strip()), "")
        assert len(rest) - len(rest.lstrip()) <= indent, name


def test_a_link_to_a_name_that_is_gone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"llama/model\.py has no RMSNorm\.gone; correct the link"):
        links.linked("[`RMSNorm.gone`](../llama/model.py#L1)")
    assert "#L1-L2)" not in links.linked("[`RMSNorm.forward`](../llama/model.py#L1-L2)")


@LANGUAGES
def test_every_section_has_formula_paper_code_example_and_picture(page: str) -> None:
    for section in sections(page)[1:13]:
        [formula] = re.findall(r"^\$\$(.+)\$\$$", section, re.MULTILINE)
        assert not re.search(r"\\[^A-Za-z]", formula), "GitHub drops the backslash of an escape"
        assert "arxiv.org/abs/" in section and links.LINK.search(section)
        assert EXAMPLE.search(section) and len(IMAGE.findall(section)) == 1


def test_pictures_are_those_of_the_code() -> None:
    assert IMAGE.findall(ENGLISH) == list(figures.PICTURES)
    assert {path.stem for path in figures.FOLDER.iterdir()} == set(figures.PICTURES)
    for path in figures.FOLDER.iterdir():
        assert path.stat().st_size < 60_000, path


@pytest.mark.parametrize("name", figures.PICTURES)
def test_pictures_are_up_to_date(name: str) -> None:
    """The same bytes with the same matplotlib; another version draws without an error.

    The losses of "training" may round differently on another processor.
    """
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra `train`")
    drawn, stored = figures.drawn(name), (figures.FOLDER / f"{name}.svg").read_bytes()
    if f"Matplotlib v{matplotlib.__version__}," in stored.decode() and name != "training":
        assert drawn == stored, f"run: python -m docs.figures {name}"


@pytest.mark.parametrize(("question", "section", "english", "chinese"), QUESTIONS)
def test_questions_are_answered(question: str, section: int, english: str, chinese: str) -> None:
    for page, answer in ((ENGLISH, english), (CHINESE, chinese)):
        text = sections(page)[section]
        assert text.startswith(f"{section}. ")
        assert answer in " ".join(text.split()), question


def test_shapes_of_the_first_table() -> None:
    """One block of 8B on the meta device, which computes shapes only."""
    with torch.device("meta"):
        args = ModelArgs(4096, 1, 32, 8, vocab_size=128256, multiple_of=1024, max_seq_len=8)
        model = Transformer(dataclasses.replace(args, ffn_dim_multiplier=1.3))
    shapes: set[tuple[int, ...]] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes.update(tuple(x.shape) for x in (*inputs, output) if isinstance(x, Tensor))

    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.Linear, RMSNorm, DotProductAttention)):
            module.register_forward_hook(note)
    hidden = model.hidden(torch.zeros(1, 6, dtype=torch.int64, device="meta"))
    shapes.add(tuple(model.logits(hidden[:, -1]).shape))
    for page in (ENGLISH, CHINESE):
        rows = re.findall(r"^\| \[.*\| (\(1.*) \|$", page, re.MULTILINE)
        wanted = [
            tuple(map(int, shape.split(", ")))
            for row in rows
            for shape in re.findall(r"\(([\d, ]+)\)", row)
        ]
        assert len(wanted) == 7
        assert set(wanted) - shapes == {(1, 32, 6, 6)}  # the weights stay inside attention


@LANGUAGES
def test_sizes_of_the_cache(page: str) -> None:
    """Each row of the table: KiB a position, GiB of 8,192 and of 131,072."""
    rows = re.findall(
        r"^\| (\d+)B\D+(\d+).* \| ([\d,]+) KiB \| ([\d.]+) GiB \| (\d+) GiB \|$", page, re.M
    )
    assert len(rows) == 4
    for name, heads, position, short, long in rows:
        dim, layers, queries = {"8": (4096, 32, 32), "70": (8192, 80, 64)}[name]
        args = ModelArgs(dim, layers, queries, int(heads), vocab_size=128256)
        size = Footprint(args, tied=False).cache_token()
        found = [size / 2**10, size * 8192 / 2**30, size * 131072 / 2**30]
        assert found == [float(x.replace(",", "")) for x in (position, short, long)]


def test_the_prompt_has_these_tokens(llama3_tokenizer_path: Path) -> None:
    ids = Tokenizer(llama3_tokenizer_path).encode("The capital of France is")
    for page in (ENGLISH, CHINESE):
        assert ", ".join(map(str, ids)) in page
