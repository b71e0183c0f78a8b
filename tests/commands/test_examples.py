"""The example scripts and the console script, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_tensor_parallel import start_torchrun, torchrun, write
from tests.train.training import write_text

ROOT = Path(__file__).parents[2]


def run(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def test_text_completion(demo_dir: Path) -> None:
    out = run("example_text_completion.py", "--temperature", "0", "--max_gen_len", "8").stdout
    assert "The capital of France is\n>  Paris" in out
    assert out.count("==========") >= 4


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_chat_completion_under_torchrun(demo_dir: Path, ranks: int) -> None:
    flags = ["--temperature", "0", "--top_p", "0.9", "--max_seq_len", "200", "--max_gen_len", "40"]
    flags += ["--ckpt_dir", str(demo_dir), "--tokenizer_path", str(demo_dir / "tokenizer.model")]
    out = torchrun(ranks, "example_chat_completion.py", *flags, "--max_batch_size", "6")
    assert out.count("> Assistant: ") == 4  # once each
    if ranks == 1:  # on three, sums in bfloat16 round otherwise, and the first id is a near tie
        assert "> Assistant: The capital of France is Paris" in out


def test_complete(demo_dir: Path) -> None:
    command = ["-m", "llama", "complete", "The capital of France is"]
    assert "Paris" in run(*command, "--temperature", "0", "--max_gen_len", "4").stdout
    flags = ["--ckpt_dir", str(demo_dir), "--quantize", "int8", "--temperature=0"]
    assert "Paris" in run(*command, *flags).stdout
    # A prompt that looks like a number stays text.
    run("-m", "llama", "complete", "1e3", "--max_gen_len", "1")


@pytest.mark.slow
def test_complete_and_perplexity_on_three_ranks(demo_dir: Path, tmp_path: Path) -> None:
    command = ["-m", "llama", "complete", "The capital of France is", "--temperature", "0"]
    assert torchrun(3, *command, "--max_gen_len", "4").startswith(" Paris")
    text = tmp_path / "text"
    text.write_text("The capital of France is Paris. The capital of Italy is Rome.")
    out = torchrun(3, "-m", "llama", "perplexity", str(text), "--json")
    alone = run("-m", "llama", "perplexity", str(text), "--json").stdout
    assert json.loads(out)["nats"] == pytest.approx(json.loads(alone)["nats"], rel=0.02)


def test_output_that_is_closed_on_two_ranks(tmp_path: Path) -> None:
    """As by `| head`: the other ranks go without a word."""
    folder = write(tmp_path / "model", vocab_size=261)
    command = ["-m", "llama", "complete", "Hi", "--ckpt_dir", folder, "--max_gen_len", "2000"]
    job = start_torchrun(2, *command)
    assert job.stdout is not None and job.stdout.read(1)
    job.stdout.close()
    job.stdout = None
    _, err = job.communicate(timeout=240)
    assert job.returncode == 0 and "llama3:" not in err and "Traceback" not in err


def test_complete_as_json(demo_dir: Path) -> None:
    command = ["-m", "llama", "complete", "The capital of France is", "--temperature", "0"]
    done = run(*command, "--max_gen_len", "30", "--stop", "\n", "--json", "--logprobs")
    result = json.loads(done.stdout)
    assert result["prompt"] == "The capital of France is" and result["generation"] == " Paris."
    assert result["finish_reason"] == "stop" and result["prompt_tokens"] == 5
    assert len(result["tokens"]) == len(result["logprobs"]) and max(result["logprobs"]) < 0
    assert "--logprobs needs --json" in run(*command, "--logprobs", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt_dir", "/nowhere"], "no checkpoint folder at /nowhere"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--tokenizer_path", "x"], "--tokenizer_path without --ckpt_dir"),
        (["--max_seq_len", "2"], "more than --max_seq_len 2"),
        (["--bogus", "2"], "no flag --bogus"),
        (["-t", "2"], "no flag -t"),
    ],
)
def test_a_mistake_is_one_line(demo_dir: Path, arguments: list[str], message: str) -> None:
    done = run("-m", "llama", "complete", "The capital of France", *arguments, code=2)
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_unquoted_prompt() -> None:
    done = run("-m", "llama", "complete", "Hello", "world", code=2)
    assert "too many words: 'world'" in done.stderr


def test_a_mistake_in_an_example_is_one_line() -> None:
    done = run("example_chat_completion.py", "--ckpt_dir", "/nowhere", code=2)
    assert "Traceback" not in done.stderr and "no checkpoint folder at /nowhere" in done.stderr


def test_an_example_refuses_an_unknown_flag_before_it_loads_a_model(tmp_path: Path) -> None:
    """With a wrong folder too, which would be the error if main had been called."""
    for example in ("example_chat_completion.py", "example_text_completion.py"):
        done = run(example, "--ckpt_dir", "/nowhere", "--bogus", "1", code=2)
        [line] = done.stderr.splitlines()
        assert line.startswith(f"{example}: ") and "--bogus" in line
    flags = ["--data", "/nowhere", "--out", str(tmp_path / "out"), "--bogus", "1"]
    [line] = run("example_train_shakespeare.py", *flags, code=2).stderr.splitlines()
    assert "--bogus" in line and not list(tmp_path.iterdir())


def test_a_script_keeps_text(tmp_path: Path) -> None:
    """Fire alone would read numbers, and a#b as a."""
    script = tmp_path / "script.py"
    script.write_text(
        "from llama import run_script\n"
        "def main(name: str, other: str | None = None, n: int = 0) -> None:\n"
        "    print([name, other, n])\n"
        "run_script(main)\n"
    )
    assert run(str(script), "3.10", "--other=a#b", "--n", "7").stdout == "['3.10', 'a#b', 7]\n"
    assert run(str(script), "1e3").stdout == "['1e3', None, 0]\n"
    assert "--other" in run(str(script), "--help").stdout


def test_version_and_demo_folder(demo_dir: Path) -> None:
    assert run("-m", "llama", "version").stdout.strip() == "0.7.0"
    assert run("-m", "llama", "demo").stdout.strip() == str(demo_dir)


def test_a_switch_takes_no_word(demo_dir: Path) -> None:
    command = ["-m", "llama", "complete", "--json", "The capital of France is"]
    done = run(*command, "--max_gen_len", "2", "--temperature", "0")
    assert json.loads(done.stdout)["generation"] == " Paris."
    assert "too many words" in run(*command, "nonsense", code=2).stderr


def test_output_that_is_closed(demo_dir: Path) -> None:
    command = f"{sys.executable} -m llama complete Hi --max_gen_len 2 >&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, timeout=240).returncode == 0


@pytest.mark.parametrize("value", ["false", "no"])
def test_a_flag_is_not_guessed(demo_dir: Path, tmp_path: Path, value: str) -> None:
    dst = tmp_path / "3.10"
    dst.mkdir()
    command = ["-m", "llama", "convert", str(demo_dir), str(dst), f"--force={value}"]
    done = run(*command, code=2)
    assert "'--force' does not take a value" in done.stderr and dst.is_dir()


def test_paths_are_taken_as_they_are(demo_dir: Path, tmp_path: Path) -> None:
    """A name that Python would read as a number, and one with a comment sign."""
    for name in ("3.10", "a#b"):
        command = [sys.executable, "-m", "llama", "convert", str(demo_dir), name]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        done = run("-m", "llama", "inspect", str(tmp_path / name))
        assert "134,515,008" in done.stdout
        done = run("-m", "llama", "verify", str(tmp_path / name))
        assert "every check passed" in done.stdout


def test_verify_tells_a_damaged_copy(demo_dir: Path, tmp_path: Path) -> None:
    for name in ("params.json", "tokenizer.model", "tokenizer.model.json"):
        (tmp_path / name).write_bytes((demo_dir / name).read_bytes())
    (tmp_path / "consolidated.00.pth").write_bytes(b"<!DOCTYPE html><html>")
    done = run("-m", "llama", "verify", str(tmp_path), code=1)
    assert "HTML" in done.stdout and "consolidated.00.pth" in done.stdout


def test_train_shakespeare(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    command = ["example_train_shakespeare.py", "--data", str(text), "--out", str(tmp_path / "run")]
    command += ["--dim=32", "--n_layers=1", "--n_heads=2", "--n_kv_heads=1", "--max_seq_len=16"]
    out = run(*command, "--steps=3", "--prompt", "king").stdout
    assert "step 3: training loss" in out and "model of step 3" in out
    assert len(out[out.rindex("\nking") :].strip()) <= 16
    assert "king" in run(*command, "--steps=4", "--prompt", "king", "--resume").stdout
