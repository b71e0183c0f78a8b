"""Results as files, their comparison, and the tables of docs/performance.md."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkouts, chinese, differences, tables, waiting
from benchmarks.random_checkpoint import SHAPES, RandomSource, write_rank_file
from benchmarks.report import Figure, finish, load_result, make_result, number, save, table
from llama import Llama
from llama.checkpoints.formats.meta_export import write_meta
from llama.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def result(*figures: Figure, name: str = "compare tiny", **more: Any) -> dict[str, Any]:
    return make_result(name, {"shape": "tiny"}, figures, **more)


def decode(*runs: float) -> Figure:
    return Figure("llama3", "decode", "tok/s", runs, better="higher")


def test_a_result_has_command_date_machine_versions_and_runs() -> None:
    measured = result(decode(10.0, 12.0, 11.0), read_GB_s=35.5)
    assert measured["command"].startswith("python -m benchmarks.compare")
    assert measured["date"][:2] == "20" and measured["machine"]["cores"] > 0
    assert measured["machine"]["read_GB_s"] == 35.5 and "flags" in measured["machine"]
    assert measured["versions"]["torch"] == torch.__version__
    [figure] = measured["figures"]
    assert figure["runs"] == [10.0, 12.0, 11.0] and figure["median"] == 11.0
    assert result(decode(1.0), name="checkouts, 1b")["command"].split()[2] == "benchmarks.checkouts"


def test_saved_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = result(decode(10.0, 12.5))
    path = tmp_path / "a.json"
    finish(measured, str(path))
    assert json.loads(path.read_text()) == measured
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == measured
    path.unlink()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        save(measured, path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_result_is_an_error(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", '{"figures": [{"row": "a"}]}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is not a result"):
            load_result(tmp_path / "a.json")


def test_table() -> None:
    rows = [
        Figure("a", "time", "s", [1.0, 5.0, 2.0]),
        Figure("a", "size", "GB", [1234.5678]),
        Figure("b", "time", "ms", [3, 4]),
    ]
    assert table([result(*rows)]) == [
        "|   | time       | size, GB |",
        "| - | ---------- | -------- |",
        "| a | 2.0 s      | 1235     |",
        "| b | 3 ms, 4 ms |          |",
    ]
    several = table([result(decode(1.0)), result(decode(2.0), name="other", read_GB_s=9.0)])
    assert [line.split("|")[1].strip() for line in several] == [
        "run", "-" * 24, "compare tiny", "other (reading 9.0 GB/s)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(Decimal("1.10"), "1.10"), (12, "12"), (0.9047618, "0.9048"), (123456.7, "123457")],
)
def test_number(value: float | Decimal, text: str) -> None:
    assert number(value) == text


def compared(
    tmp_path: Path, old: list[Figure], new: list[Figure], tolerance: float = 0.03
) -> tuple[int, str]:
    """(exit code, verdict of the first figure)."""
    for name, figures in (("old", old), ("new", new)):
        save(result(*figures), tmp_path / f"{name}.json")
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    rows, _ = differences.compare(load_result(paths[0]), load_result(paths[1]), tolerance)
    try:
        differences.main(str(paths[0]), str(paths[1]), tolerance)
    except SystemExit as e:
        return int(e.code or 0), rows[0][-1]
    return 0, rows[0][-1]


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = [decode(99.0, 100.0, 101.0)]
    assert compared(tmp_path, old, [decode(98.0)]) == (0, "")
    assert "100.0 tok/s  98.0 tok/s  0.980" in capsys.readouterr().out
    assert compared(tmp_path, old, [decode(96.0)]) == (1, "worse")
    assert "1 of 1 figures differ by more than 0.03" in capsys.readouterr().out
    assert compared(tmp_path, old, [decode(104.0)]) == (1, "better")
    assert compared(tmp_path, old, [decode(104.0)], 0.05) == (0, "")
    slow = Figure("llama3", "first token", "s", [1.0], better="lower")
    slower = Figure("llama3", "first token", "s", [1.1], better="lower")
    assert compared(tmp_path, [slow], [slower]) == (1, "worse")
    assert compared(tmp_path, [*old, slow], old) == (1, "")
    assert "only in old" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--tolerance must be a number, 0 or more, not -1"):
        differences.main("a", "b", -1)


def test_the_page_is_up_to_date() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.rewrite(page) == page, "run `python -m benchmarks.tables`"


def test_the_page_shows_every_result() -> None:
    names = {path.stem for path in tables.RESULTS.glob("*.json")}
    shown = tables.shown(tables.PAGE.read_text(encoding="utf-8"))
    assert shown == names, "name the result in a `<!-- results: -->` comment of the page"


def test_sections_are_rewritten(tmp_path: Path) -> None:
    save(result(decode(7.0)) | {"notes": ["Alone."]}, tmp_path / "one.json")
    page = "Text.\n\n<!-- results: one -->\nold\n<!-- end of results -->\n\nMore text.\n"
    new = tables.rewrite(page, tmp_path)
    assert new.startswith("Text.\n\n<!-- results: one -->\n\n    python -m benchmarks.compare")
    assert "| llama3 | 7.0           |" in new and "\n- Alone.\n" in new and "old" not in new
    assert new.endswith("\n\n<!-- end of results -->\n\nMore text.\n")
    assert tables.rewrite(new, tmp_path) == new
    with pytest.raises(FileNotFoundError, match=r"no result at .*two\.json"):
        tables.rewrite(page.replace("one", "two"), tmp_path)


def test_a_table_for_each_part() -> None:
    """Of a result of `benchmarks.gpu`, whose figures name their parts."""
    measured = result(decode(7.0), Figure("copy", "speed", "GB/s", [3000.0]))
    for figure, part in zip(measured["figures"], ("decode-bf16", "ceilings"), strict=True):
        figure["part"] = part
    measured |= {"notes": ["nccl: one GPU: not measured"]}
    text = "\n".join(tables.lines([measured]))
    assert "\n**decode-bf16**\n\n|        | decode, tok/s |\n" in text
    assert "\n\n**ceilings**\n\n|      | speed, GB/s |\n" in text
    assert text.endswith("\n\n- nccl: one GPU: not measured")


@pytest.mark.parametrize("vocab_size", [300, 512, 70000])
def test_rank_file(tmp_path: Path, vocab_size: int) -> None:
    """Its tokenizer has as many tokens as the model."""
    params = {"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": vocab_size, "multiple_of": 32}
    write_meta(RandomSource(params), None, tmp_path, torch.float32)
    write_rank_file(tmp_path / "tokenizer.model", vocab_size)
    llama = Llama.build(tmp_path, None, 16, 1, device="cpu")
    assert llama.tokenizer.n_words == vocab_size
    assert len(llama.generate([[1, 2]], 3, temperature=0)[0][0]) == 3


def test_checkouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This checkout beside itself."""
    tiny = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 600, "multiple_of": 32}
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    monkeypatch.setattr(checkouts, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(checkouts, "PREFILL", (8, 16))
    monkeypatch.setattr(checkouts, "NEW", 3)
    out = tmp_path / "a.json"
    checkouts.main(str(ROOT), str(ROOT), "tiny", quantize="int8", rounds=1, repeats=2, out=str(out))
    measured = load_result(out)
    assert measured["same_ids"] and set(measured["checkouts"]) == {"old", "new"}
    runs = {(f["row"], f["column"]): len(f["runs"]) for f in measured["figures"]}
    for row in ("prefill of 8 tokens", "prefill of 16 tokens", "decode after 128 tokens"):
        assert runs[row, "old"] == runs[row, "new"] == 2
    assert all(runs[row, "new / old"] == 1 for row, _ in runs)
    assert "all answers have the same ids: yes" in capsys.readouterr().out


def test_a_failing_checkout_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout whose package cannot be imported."""
    monkeypatch.setattr(checkouts, "write_meta", lambda *_: None)
    monkeypatch.setattr(checkouts, "READ_BYTES", 1 << 20)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "__init__.py").write_text("raise ImportError('broken')")
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        checkouts.main(str(tmp_path), str(tmp_path), rounds=1)


def test_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A figure for each policy, work and state, from a process of its own."""
    waiting.measure("train", 0.01)
    assert float(capsys.readouterr().out) > 0
    monkeypatch.setattr(waiting, "in_a_process", lambda work, seconds, policy: 1.0 + len(policy))
    out = tmp_path / "waiting.json"
    waiting.main(runs=1, seconds=0.01, out=str(out))
    figures = json.loads(out.read_text())["figures"]
    columns = {f"{work}, {state}" for work in ("decode", "train") for state in ("idle", "loaded")}
    assert {(f["row"], f["column"]): f["median"] for f in figures} == {
        (row, column): 1.0 + len(policy)
        for row, policy in waiting.POLICIES.items()
        for column in columns
    }


def test_chinese_text_is_split_by_paragraphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_tokenizer_path: Path
) -> None:
    monkeypatch.setattr(chinese, "HELD_OUT", 40)
    data = tmp_path / "zh.txt"
    paragraphs = [f"第{i}段。\n文件" for i in range(9)]
    data.write_text("\n\n".join([*paragraphs, paragraphs[0]]), encoding="utf-8")
    train, held_out = (path.read_text("utf-8") for path in chinese.split(data, tmp_path))
    found = train.split("\n\n"), held_out.split("\n\n")
    assert sorted(found[0] + found[1]) == paragraphs and len(found[1]) == 3
    tokenizer = Tokenizer(byte_tokenizer_path)
    assert chinese.tokens_a_character(tokenizer, "文 x。件") == 3.0
