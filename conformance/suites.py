"""Each suite: run it against a server, and read its outcomes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from deselected import DESELECTED
from environment import CACHE, HERE, HF_EXPORT, LLAMA_CPP_TESTS, NODE, PYTHON, ROOT
from results import Result, deselect, read_results
from server import Server

BIN = PYTHON.parent
LOGS = CACHE / "logs"


@dataclass(frozen=True)
class Suite:
    """`flags` are those of `llama3 serve`: suites with the same flags share a server."""

    name: str
    run: Callable[[Server], list[Result]]
    flags: tuple[str, ...]


def execute(
    name: str,
    *command: str | Path,
    cwd: Path = ROOT,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run a suite's command and keep what it prints as a log; its standard output."""
    log = LOGS / f"{name}.log"
    with log.open("w") as errors:
        process = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=3600,
        )
        errors.write(process.stdout)
    return process.stdout


def with_pytest(
    name: str,
    server: Server,
    *arguments: str | Path,
    cwd: Path = ROOT,
    variables: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run tests with the plugin that deselects and reports."""
    report = LOGS / f"{name}.jsonl"
    report.unlink(missing_ok=True)
    plugins = ("-p", "no:cacheprovider", "-p", "pytest_report")
    ours = {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, cwd))),
        "CONFORMANCE_REPORT": str(report),
        "CONFORMANCE_DESELECT": json.dumps(DESELECTED.get(name, {})),
        "CONFORMANCE_URL": server.v1,
        "CONFORMANCE_MODEL": server.model,
    }
    execute(
        name,
        *(PYTHON, "-m", "pytest", "-q", *plugins, *arguments),
        cwd=cwd,
        variables={**ours, **(variables or {})},
    )
    return read_results(report) if report.is_file() else [Result(name, "failed", "did not run")]


def expected(name: str, results: list[Result]) -> list[Result]:
    if not results:
        results = [Result(name, "failed", f"printed no results: {LOGS / name}.log")]
    return deselect(results, DESELECTED.get(name, {}))


def openai_python(server: Server) -> list[Result]:
    return with_pytest("openai-python", server, HERE / "strict_openai.py")


def openai_javascript(server: Server) -> list[Result]:
    script = Path(shutil.copy(HERE / "strict_openai.mjs", NODE))  # beside its node_modules
    output = execute("openai-javascript", "node", script, server.v1, server.model)
    results = [Result(**json.loads(line)) for line in output.splitlines()]
    return expected("openai-javascript", results)


def langchain(server: Server) -> list[Result]:
    # One event loop for all tests: the openai client keeps its connections.
    loop = ("-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session")
    arguments = (HERE / "langchain_suite.py", "--benchmark-disable", *loop)
    return with_pytest("langchain", server, *arguments, variables={"LANGSMITH_TRACING": "false"})


def llm_comply(server: Server) -> list[Result]:
    output = execute(
        "llm-comply",
        *(BIN / "llm-comply", "--format", "openai-chat", "--json", "--timeout", "300"),
        *("-u", server.v1, "-k", "none", "-m", server.model),
    )
    found = json.loads(output[output.index("{") :])["results"]
    results = [
        Result(r["id"], r["status"], "; ".join(r.get("errors") or r.get("warnings") or []))
        for r in found
    ]
    return expected("llm-comply", results)


def compatcanary(server: Server) -> list[Result]:
    output = execute(
        "compatcanary",
        *("node", NODE / "node_modules" / "compatcanary" / "src" / "cli.js", "scan"),
        *("--base-url", server.v1, "--model", server.model),
        *("--format", "json", "--timeout", "300", "--fail-on", "never"),
    )
    states = {"pass": "passed", "warn": "failed", "fail": "failed"}
    found = json.loads(output)["results"]
    return expected(
        "compatcanary", [Result(r["id"], states[r["status"]], r["summary"]) for r in found]
    )


def provider_check(server: Server) -> list[Result]:
    """Tiers 1 to 5; the sixth only measures."""
    output = execute(
        "provider-check",
        *(BIN / "trustedrouter-provider-check", "--base-url", server.v1),
        *("--model", server.model, "--tier", "5", "--json", "-"),
    )
    states = {"pass": "passed", "warn": "failed", "fail": "failed", "skip": "skipped"}
    found = json.loads(output)["checks"]
    results = [Result(r["id"], states[r["status"]], json.dumps(r["measured"])) for r in found]
    return expected("provider-check", results)


def schemathesis(server: Server) -> list[Result]:
    """Every operation of /openapi.json, by generated requests, right and wrong ones.

    Right ones may still be refused: a schema does not say that top_logprobs needs logprobs, or
    which ids the vocabulary has.
    """
    report = LOGS / "schemathesis.xml"
    execute(
        "schemathesis",
        *(BIN / "schemathesis", "run", f"{server.root}/openapi.json"),
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance", "--seed", "1"),
        *("--max-examples", "100", "--continue-on-failure", "--request-timeout", "60"),
        *("--max-response-time", "60"),
        *("--report", "junit", "--report-junit-path", report),
        cwd=LOGS,
    )
    results = []
    for case in ElementTree.parse(report).iter("testcase"):
        failure = next(
            (case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None
        )
        if failure is not None:
            results.append(Result(case.attrib["name"], "failed", failure.attrib.get("message", "")))
        else:
            state = "passed" if case.find("skipped") is None else "skipped"
            results.append(Result(case.attrib["name"], state))
    return expected("schemathesis", results)


def llama_cpp(server: Server) -> list[Result]:
    variables = {"DEBUG_EXTERNAL": "1", "PORT": str(server.port)}
    arguments = ("-p", "llama_cpp_plugin", "unit")
    return with_pytest("llama.cpp", server, *arguments, cwd=LLAMA_CPP_TESTS, variables=variables)


def lm_eval(server: Server) -> list[Result]:
    """Ours by `local-completions`, item by item equal to `--model hf` on the export."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(CACHE / "hf")}
    ours = (
        f"base_url={server.v1}/completions,model={server.model},tokenizer={HF_EXPORT},"
        "tokenizer_backend=huggingface,tokenized_requests=True,max_length=1002,num_concurrent=2"
    )
    theirs = f"pretrained={HF_EXPORT},dtype=float32,max_length=1000"
    items = {}
    for kind, arguments in (("local-completions", ours), ("hf", theirs)):
        folder = LOGS / f"lm-eval-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        execute(
            f"lm-eval-{kind}",
            *(BIN / "lm-eval", "run", "--model", kind, "--model_args", arguments),
            *("--include_path", HERE / "lm_eval_tasks", "--tasks", "choices,texts,answers"),
            *("--device", "cpu", "--batch_size", "1", "--log_samples", "--output_path", folder),
            variables=offline,
        )
        items[kind] = samples(folder)
    results = [
        Result(name, *compare(items["local-completions"].get(name), answer))
        for name, answer in items["hf"].items()
    ]
    return expected("lm-eval", results)


def samples(folder: Path) -> Mapping[str, Any]:
    """`task-number` of each item: what the model answered."""
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        task = path.name.split("_")[1]
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            found[f"{task}-{sample['doc_id']}"] = sample["filtered_resps"]
    return found


def compare(ours: Any, theirs: Any) -> tuple[str, str]:
    """Texts and flags are equal, log-probabilities within 1e-3."""
    equal = len(ours or ()) == len(theirs) and all(map(close, flat(ours), flat(theirs)))
    return ("passed", "") if equal else ("failed", f"{ours} is not {theirs}")


def flat(answer: Any) -> list[Any]:
    return (
        [leaf for part in answer for leaf in flat(part)] if isinstance(answer, list) else [answer]
    )


def close(a: Any, b: Any) -> bool:
    """The samples hold numbers as texts."""
    try:
        return math.isclose(float(a), float(b), rel_tol=0, abs_tol=1e-3)
    except ValueError:
        return bool(a == b)


# Plain numbers, so that answers are equal whatever is computed beside them; and little room, as the
# demo model does not always come to an end.
FLAGS = ("--dtype", "fp32", "--max_seq_len", "2048")
SUITES = (
    Suite("openai-python", openai_python, FLAGS),
    Suite("openai-javascript", openai_javascript, FLAGS),
    Suite("llm-comply", llm_comply, FLAGS),
    Suite("compatcanary", compatcanary, FLAGS),
    Suite("provider-check", provider_check, FLAGS),
    Suite("langchain", langchain, FLAGS),
    Suite("llama.cpp", llama_cpp, FLAGS),
    Suite("lm-eval", lm_eval, FLAGS),
    Suite("schemathesis", schemathesis, ("--max_seq_len", "64")),
)
