"""main.py, options.py, run.py: the command line of every verb; the mistakes of its user."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

import llama
from llama.checkpoints.plan import PlanOptions
from llama.commands.model import CheckpointFlags
from llama.commands.options import Only, typer_function
from llama.commands.parser import VERBS, make_command, parse
from llama.commands.run import MISTAKES, error_text
from llama.common.options import option
from llama.engine.sampling import Sampling
from llama.generation import BuildOptions
from llama.server.settings import ServerSettings
from llama.train import Settings
from tests.distributed.test_tensor_parallel import start_torchrun

ROOT = Path(__file__).parents[2]
ALL = [verb for verbs in VERBS.values() for verb in verbs]
# Flags for which "1" is no value.
VALUES = {"dtype": "float32", "parallel": "ddp", "dim": "4", "quantize": "int8", "scheme": "int8"}
VALUES |= {"cors_origin": "https://a.example", "method": "lora", "targets": "wq", "dropout": "0.1"}
VALUES |= {"format": "auto", "template": "auto", "tool_form": "json", "beta": "0.1"}
# --hf and --ckpt_dir exclude each other, as do these of finetune and their other form.
EXCLUDED = {"finetune": ("--steps", "--val_data")}
VALUES |= dict.fromkeys(("beta1", "beta2", "val_fraction", "test_fraction"), "0.1")
DATACLASSES: dict[str, list[Any]] = {
    "complete": [Sampling, CheckpointFlags, BuildOptions],
    "chat": [Sampling, CheckpointFlags, BuildOptions],
    "perplexity": [CheckpointFlags, BuildOptions],
    "train": [Settings],
    "plan": [PlanOptions],
    "serve": [ServerSettings, Sampling, CheckpointFlags, BuildOptions],
}


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def flags(verb: str) -> list[Any]:
    return [p for p in make_command(verb).params if p.param_type_name == "option"]


def arguments(verb: str, dashes: bool = False) -> list[str]:
    """A command line with every flag of a verb."""
    words = [verb, *("x" for p in make_command(verb).params if p.param_type_name == "argument")]
    for flag in flags(verb):
        name = flag.opts[0]
        if name in ("--quiet", "--hf", *EXCLUDED.get(verb, ())):  # --quiet: of another call
            continue
        words.append("--" + name[2:].replace("_", "-") if dashes else name)
        if not flag.is_flag:
            words.append(VALUES.get(flag.name, "1"))
    return words


@pytest.mark.parametrize("verb", ALL)
def test_dashes_are_underscores(verb: str) -> None:
    """In every flag of every verb; both give the same call."""
    with_underscores: Any = parse(arguments(verb))
    with_dashes: Any = parse(arguments(verb, dashes=True))
    assert with_dashes.func is with_underscores.func
    assert with_dashes.keywords == with_underscores.keywords


@pytest.mark.parametrize("verb", ALL)
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It has each flag with its text, an example that parses, and fits into 80 columns."""
    with pytest.raises(SystemExit) as ended:
        parse([verb, "--help"])
    assert not ended.value.code
    text, _, examples = capsys.readouterr().out.partition("Examples:\n")
    words = " ".join(text.split())
    for flag in flags(verb):
        assert flag.help and flag.opts[0] in text and " ".join(flag.help.split()) in words
    assert all(len(line) <= 80 for line in text.splitlines())
    assert examples.strip()
    for line in examples.strip().splitlines():
        _, command, rest = line.partition(f"{verb} ")
        assert f"{verb}" in line and len(line) <= 90
        parse([verb, *shlex.split(rest)] if command else [verb])


def test_the_list_of_verbs_does_not_import_torch() -> None:
    code = (
        "import sys, llama; assert not {'torch', 'typer', 'fire', 'gguf'} & set(sys.modules)\n"
        "sys.argv = ['llama3', '--help']\n"
        "from llama.commands.main import main\n"
        "main()\n"
    )
    check = "\nimport atexit\natexit.register(lambda: print('torch' in sys.modules))\n"
    done = subprocess.run(
        [sys.executable, "-c", "import sys" + check + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    for heading, verbs in VERBS.items():
        assert f"{heading}:" in done.stdout
        assert all(f"\n  {verb} " in done.stdout for verb in verbs)


def test_names_of_the_package() -> None:
    assert sorted(llama.__all__) == sorted(n for names in llama.MODULES.values() for n in names)
    assert all(getattr(llama, name) is not None for name in llama.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llama.nothing  # noqa: B018


@pytest.mark.parametrize("verb", DATACLASSES)
def test_defaults_are_those_of_the_dataclass(verb: str) -> None:
    found = {flag.name: flag for flag in flags(verb)}
    kind: Any
    for kind in DATACLASSES[verb]:
        offered = [field for field in dataclasses.fields(kind) if field.name in found]
        own = {"perplexity": ["max_seq_len"], "serve": ["max_batch_size", "adapter"]}.get(verb, [])
        offered = [field for field in offered if field.name not in own]
        assert len(offered) == len(dataclasses.fields(kind)) or kind is BuildOptions
        for field in offered:
            assert found[field.name].default == field.default
            assert found[field.name].help == field.metadata["help"]
    needed = {"train": ["--data=x", "--out=x"], "complete": ["x"], "perplexity": ["x"]}
    call: Any = parse([verb, *needed.get(verb, [])])
    built: list[Any] = [v for v in call.keywords.values() if dataclasses.is_dataclass(v)]
    assert all(value == type(value)() for value in built) and built


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "no verb 'nonsense'; `llama3 --help` lists the verbs"),
        (["server"], "Did you mean serve?"),
        (["run"], "type `llama3 chat -m CHECKPOINT`"),
        (["list"], "`llama3 inspect PATH`"),
        (["complete", "Hi", "--max-genlen", "1"], "Did you mean --max_gen_len"),
        (["complete", "Hi", "--max_tokens", "1"], "Did you mean --max_gen_len"),
        (["perplexity", "x", "--context", "1"], "Did you mean --max_seq_len"),
        (["plan", "--batch", "1"], "Did you mean --max_batch_size"),
        (["complete", "Hi", "-t", "1"], "no flag -t; `llama3 complete --help` lists them"),
        (["--bogus"], "no flag --bogus"),
        (["complete"], "takes either PROMPT, the text to continue, or --prompt_file"),
        (["verify"], "verify needs PATH: a checkpoint"),
        (["quantize", "a", "b"], "quantize needs --scheme: int8, or int4"),
        (["complete", "Hi", "--max_gen_len", "many"], "Invalid value for '--max_gen_len'"),
        (["complete", "Hi", "--max_gen_len"], "--max_gen_len needs a value: most tokens to"),
        (["complete", "Hi", "-n"], "-n needs a value: most tokens to generate"),
        (["chat", "Hi"], "too many words: 'Hi'; llama3 chat takes flags only"),
        (["complete", "Hi", "-m", "a/b"], "llama3 download a/b"),
        (["complete", "Hi", "-m", "a", "--hf", "b/c"], "--ckpt_dir and --hf: give one of them"),
        (["complete", "Hi", "--temperature", "-1"], "--temperature must be 0 or more"),
        (["perplexity", "/nowhere"], "there is no /nowhere; check the name"),
        (["perplexity", "/"], "/ is a folder; give a file"),
        (["complete", "--prompt_file", "/nowhere"], "there is no /nowhere; check the name"),
        (["inspect", "/nowhere"], "no checkpoint folder at /nowhere; check the path"),
        (["complete", "Hi", "--json=True"], "'--json' does not take a value"),
        (["complete", "Hi", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["complete", "Hi", "--device", "abacus"], "unknown device 'abacus'"),
        (["serve", "--served-model-name", "x"], "Did you mean --model_name"),
        (["serve", "-m", "a/b", "--port", "0"], "llama3 download a/b"),
        # Before a checkpoint is opened, which is not there.
        (["complete", "Hi", "--max_gen_len", "-1", "--ckpt_dir", "x"], "--max_gen_len must be 0"),
        (["chat", "--max_gen_len", "-1", "--ckpt_dir", "x"], "--max_gen_len must be 0 or more"),
        (["serve", "--port", "70000", "-m", "x"], "--port must be 0 to 65535, not 70000"),
        (["serve", "--host", "203.0.113.7", "-m", "x"], "--host 203.0.113.7 is no address of"),
        (["serve", "--cors-origin", "*", "-m", "x"], "--cors_origin must be an exact origin"),
        (["serve", "--api-key", "", "-m", "x"], "--api_key must be printable ASCII"),
        (["serve", "--max-queue", "0", "-m", "x"], "--max_queue must be 1 or more"),
        (["train", "--data", "x", "--out", "y", "--steps", "0"], "steps must be a positive"),
    ],
)
def test_mistakes(demo_dir: Path, words: list[str], message: str) -> None:
    with pytest.raises(MISTAKES) as raised:
        parse(words)()
    text = error_text(raised.value)
    assert message in text and "\n" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no verb 'trian'. Did you mean train?"),
        (["complete", "Hi", "--temprature", "1"],
         "no flag --temprature. Did you mean --temperature?"),
        (["complete", "Hello", "world"],
         "too many words: 'world'; llama3 complete takes PROMPT; quote a text with spaces"),
        (["complete", b"caf\xe9"], "is not text in UTF-8"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words: list[str | bytes], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llama", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("llama3: ") and message in line


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_mistake_on_two_ranks_is_one_line() -> None:
    job = start_torchrun(2, "-m", "llama", "complete", "Hi", "--temprature", "1")
    _, err = job.communicate(timeout=240)
    assert job.returncode != 0
    assert err.count("llama3: ") == err.count("Did you mean --temperature?") == 1


def test_version() -> None:
    assert (
        run("--version").stdout
        == run("-V").stdout
        == run("version").stdout
        == f"{llama.__version__}\n"
    )


def test_without_a_verb() -> None:
    assert "Generate text:" in run().stdout


@pytest.mark.parametrize("text", ["1e3", "3.10", "None", "[1]", "a#b", "'quoted'", "--x"])
def test_text_stays_text(text: str) -> None:
    call: Any = parse(["complete", "--stop", text, "--", text])
    assert call.keywords["prompt"] == text and call.keywords["stop"] == [text]


def test_completion_of_the_shell() -> None:
    def complete(line: str, **more: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        code = "from llama.commands.main import main; main()"
        env = environment() | {"_LLAMA3_COMPLETE": "complete_bash", **words}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env
        )
        return done.stdout.split()

    assert complete("llama3 c") == ["chat", "complete", "convert"]
    assert complete("llama3 plan --device") == ["--device_memory"]


@dataclass(frozen=True)
class Numbers:
    one: int = option(1, "the first")
    two: str | bytes | None = option(None, "the second")

    def __post_init__(self) -> None:
        if self.one < 0:
            raise ValueError("one must be 0 or more")


def test_expansion_of_a_dataclass() -> None:
    calls: list[Any] = []

    def offers_one(
        word: Annotated[str, "a word"],
        *,
        some: Annotated[Numbers, Only("two")],
        switch: Annotated[bool, "a switch"] = False,
    ) -> None:
        calls.append((word, some, switch))

    def offers_all(*, numbers: Numbers) -> None:
        calls.append(numbers)

    def call(verb: Any, *words: str) -> Any:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command()(typer_function(verb))
        command: Any = typer.main.get_command(app)
        with command.make_context("x", list(words)) as ctx:
            command.invoke(ctx)()
        return calls.pop()

    assert call(offers_one, "w") == ("w", Numbers(), False)
    assert call(offers_one, "w", "--two", "2", "--switch") == ("w", Numbers(two="2"), True)
    with pytest.raises(Exception, match="No such option: --one"):
        call(offers_one, "w", "--one", "2")
    assert call(offers_all, "--one", "2") == Numbers(2)
    with pytest.raises(ValueError, match="one must be 0 or more"):
        call(offers_all, "--one", "-1")


ENDS = """
import os, signal, sys, logging
from llama.commands.run import run_command
def command():
    logging.getLogger("llama").info("a message")
    {}
run_command(command, "name")
"""


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("print('done')", 0, "a message\n"),
        ("raise ValueError('wrong')", 2, "a message\nname: wrong\n"),
        ("raise SystemExit(1)", 1, "a message\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "a message\nname: interrupted\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "a message\n"),
        ("raise BrokenPipeError", 0, "a message\n"),
        ("raise KeyError('bug')", 1, "KeyError: 'bug'\n"),
    ],
)
def test_how_a_command_ends(body: str, code: int, err: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(body)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code
    assert done.stderr.endswith(err) and ("Traceback" in done.stderr) == (code == 1 and "K" in body)


def test_ways_to_ask_for_help() -> None:
    helped = run("chat", "--help").stdout
    assert helped == run("help", "chat").stdout == run("chat", "-h").stdout
    assert run("help").stdout == run("--help").stdout == run("-h").stdout


def test_a_warning_is_one_line(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(vocab_size=304)
    done = run("convert", str(folder), str(tmp_path / "out"), "-q")
    [line] = done.stderr.splitlines()
    assert line.startswith("llama3: warning: ") and "no tokenizer" in line
