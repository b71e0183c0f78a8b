"""`LlamaLM` gives the scores and answers of lm-eval's own model on the Hugging Face export."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama.checkpoints.convert import convert
from llama.commands.evaluate import eval as eval_verb
from llama.commands.model import CheckpointFlags
from llama.evaluation.answers import interleaved
from llama.generation import BuildOptions

ROWS = 3
LENGTH = 200  # positions
QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "a river"], "answer": 0},
    {"question": "Ice melts when it is ", "choices": ["heated", "cooled", "ab"], "answer": 0},
    {"question": "def add(a, b):\n    return", "choices": ["a + b", "None"], "answer": 0},
    {"question": "Die Hauptstadt von Österreich ist", "choices": ["Wien", "Zürich"], "answer": 0},
]
TEXTS = [{"text": "Zwölf Boxkämpfer 🙂"}, {"text": "In a hole in the ground. " * 30}]
COMMON = {"test_split": "test", "dataset_path": "json"}
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "num_fewshot": 1,
        "metric_list": [{"metric": "acc"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["o", "\n"], "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
PAIRS = [
    ("", "abc"),
    ("", "<|begin_of_text|>abc"),
    ("Hello  ", "there"),
    ("<|begin_of_text|>Hello", " you"),
    ("One<|eot_id|>two", "<|reserved_special_token_2|> three"),
    ("long " * 80, "enough"),
    ("x", "long " * 39),
    ("Grüße, 世", "界 🙂"),
]


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    """Any attempt to connect fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network is used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Task files over JSON files, by the names of the tasks."""
    folder, found = tmp_path_factory.mktemp("tasks"), {}
    for name, task in TASKS.items():
        rows = TEXTS if name == "texts" else QUESTIONS
        data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        whole = (
            COMMON | task | {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        )
        path.write_text(json.dumps(whole))
        found[name] = str(path)
    return found


@pytest.fixture(scope="module")
def checkpoint(
    folder: Path, byte_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny checkpoint with a tokenizer."""
    whole = tmp_path_factory.mktemp("base")
    for path in (*folder.iterdir(), byte_tokenizer_path):
        (whole / path.name).symlink_to(path)
    return whole


@pytest.fixture(scope="module")
def models(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours, and lm-eval's on the export."""
    from lm_eval.api.registry import get_model

    import llama.evaluation  # noqa: F401 - registers "llama3"

    export = tmp_path_factory.mktemp("export") / "hf"
    convert(checkpoint, export, to="hf", mp=None, dtype=None, force=False)
    device = {"device": "cpu"}
    ours = f"ckpt_dir={checkpoint},max_length={LENGTH},dtype=fp32"
    theirs = f"pretrained={export},max_length={LENGTH},dtype=float32"
    return (
        get_model("llama3").create_from_arg_string(ours, device | {"batch_size": ROWS}),
        get_model("hf").create_from_arg_string(theirs, device | {"batch_size": 1}),
    )


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_scores_of_pairs(models: tuple[Any, Any]) -> None:
    """Empty and cut contexts, spaces between the two texts, begin tokens, special tokens."""
    greedy = [(q, {"until": ["\n"], "max_gen_toks": 5}) for q in ("a", "b")]
    [ours, theirs] = [m.generate_until(instances("generate_until", greedy)) for m in models]
    assert ours == theirs
    pairs = PAIRS + [(q, a) for (q, _), a in zip(greedy, ours, strict=True) if "�" not in a]
    [found, want] = [m.loglikelihood(instances("loglikelihood", pairs)) for m in models]
    for pair, (score, is_greedy), (right, is_right) in zip(pairs, found, want, strict=True):
        assert score == pytest.approx(right, abs=1e-3), pair
        assert is_greedy == is_right, pair


@pytest.mark.parametrize("chat", [False, True])
def test_tasks(models: tuple[Any, Any], files: dict[str, str], chat: bool) -> None:
    """Prompts, scores, answers and metrics of tasks, with few-shot examples."""
    from llama.evaluation.tasks import evaluate, load_tasks

    tasks = load_tasks(list(files.values()))
    ours, theirs = (
        evaluate(
            model,
            tasks,
            apply_chat_template=chat,
            system_instruction="Be brief." if chat else None,
            bootstrap_iters=0,
        )
        for model in models
    )
    assert ours is not None and theirs is not None
    for task in TASKS:
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"]
            assert deep(one["resps"]) == pytest.approx(deep(other["resps"]), abs=1e-3)
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-5)
    assert len({text for s in ours["samples"]["answers"] for [text] in s["resps"]}) > 1


def test_chat_prompts(models: tuple[Any, Any]) -> None:
    """Also those that end with the beginning of the answer."""
    dialog = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": " Say <b>so</b>. "},
        {"role": "assistant", "content": " Well, "},
    ]
    for history, begun in ((dialog[:2], False), (dialog, True), (dialog[1:], True)):
        ours, theirs = (m.apply_chat_template(history, not begun) for m in models)
        assert ours == theirs
    assert models[0].chat_template(True) == models[1].chat_template(True)
    assert models[0].chat_template(False) is None
    with pytest.raises(ValueError, match="tool_use"):
        models[0].chat_template("tool_use")


def deep(value: Any) -> list[Any]:
    """The numbers and texts in nested lists."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in deep(part)]
    return [value]


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {key}": value
        for task, values in results["results"].items()
        for key, value in values.items()
        if isinstance(value, float)
    }


def test_choices_start_from_their_context(models: tuple[Any, Any]) -> None:
    """Contexts that several continuations share are computed once: a row holds each."""
    ours, _ = models
    pairs = [
        (f"{i} question of forty letters, more or less", c) for i in range(1, 5) for c in "abc"
    ]
    ours.llama.engine.forget()
    before = ours.llama.engine.metrics().cached_tokens
    ours.loglikelihood(instances("loglikelihood", pairs))
    length = len(ours.tok_encode(pairs[0][0]))
    # The last group has rows for all its members at once.
    assert ours.llama.engine.metrics().cached_tokens - before >= 6 * (length - 1)


def test_interleaved() -> None:
    assert interleaved("aabbbcd", 2) == [0, 2, 1, 3, 4, 5, 6]
    assert interleaved("abab", 5) == [0, 1, 2, 3]
    assert interleaved("", 3) == []


def test_sampling_is_repeatable_and_unknown_settings_are_refused(models: tuple[Any, Any]) -> None:
    ours, _ = models

    def answers(**settings: Any) -> list[str]:
        asked = [("Hello", {"max_gen_toks": 8} | settings)] * 4
        found: list[str] = ours.generate_until(instances("generate_until", asked))
        return found

    drawn = answers(do_sample=True, temperature=2.0, top_k=50)
    assert drawn == answers(do_sample=True, temperature=2.0, top_k=50)
    assert len(set(drawn)) > 1 and len(set(answers())) == 1
    with pytest.raises(ValueError, match="num_beams"):
        answers(num_beams=4)
    with pytest.raises(ValueError, match="max_gen_toks is 200"):
        answers(max_gen_toks=LENGTH)
    with pytest.raises(ValueError, match="max_length"):
        ours.loglikelihood(instances("loglikelihood", [("a", "b" * 2 * LENGTH)]))


def test_verb(
    checkpoint: Path, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "results.json"
    eval_verb(
        tasks=[f"{files['choices']},{files['answers']}"],
        limit=2,
        out=str(out),
        log_samples=True,
        checkpoint=CheckpointFlags(str(checkpoint)),
        build=BuildOptions(max_seq_len=LENGTH, device="cpu"),
    )
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "metric", "value", "error", "questions", "few-shot"]
    assert [line.split()[0] for line in lines] == ["choices", "answers"]
    assert all(line.split()[-2:] == ["2", shots] for line, shots in zip(lines, "10", strict=True))
    results = json.loads(out.read_text())
    assert len(results["samples"]["answers"]) == 2
    value = results["results"]["choices"]["acc,none"]
    assert f"{value:.4f}" in lines[0]


def test_wrong_tasks(files: dict[str, str], tmp_path: Path) -> None:
    from llama.evaluation.tasks import load_tasks

    def wrong(**changes: Any) -> str:
        path = tmp_path / "wrong.yaml"
        path.write_text(json.dumps(json.loads(Path(files["choices"]).read_text()) | changes))
        return str(path)

    absent = {"data_files": {"test": str(tmp_path / "absent.jsonl")}}
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl.*current folder"):
        load_tasks([wrong(dataset_kwargs=absent)])
    with pytest.raises(FileNotFoundError, match="no task file"):
        load_tasks([str(tmp_path / "absent.yaml")])
    with pytest.raises(ValueError, match=r"wrong\.yaml: .*dev"):
        load_tasks([wrong(test_split="dev")])
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        load_tasks([str(tmp_path / "broken.yaml")])
