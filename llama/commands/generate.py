"""`llama3 complete` and `llama3 perplexity`."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import Annotated, Any

from llama.commands.model import BuildFlags, CheckpointFlags, open_model
from llama.commands.options import Only
from llama.commands.terminal import print_json, print_remark, print_text
from llama.distributed import job, tensor_parallel
from llama.engine.checks import check_count
from llama.engine.sampling import Sampling
from llama.engine.scoring import check_windows, read_text
from llama.generation import BuildOptions, Stream


def complete(
    prompt: Annotated[
        str | None, "the text to continue, quoted; - reads it from standard input"
    ] = None,
    *,
    prompt_file: Annotated[str | None, "a file with the text to continue, in UTF-8"] = None,
    max_gen_len: Annotated[int, "most tokens to generate"] = 64,
    stop: Annotated[
        list[str] | None, "a text that ends the continuation and is left out; may be repeated"
    ] = None,
    json: Annotated[bool, "print one JSON object, when the continuation is complete"] = False,
    logprobs: Annotated[bool, "with --json, also the log-probability of each token"] = False,
    sampling: Sampling,
    checkpoint: CheckpointFlags,
    build: BuildFlags,
) -> None:
    """Continue a text.

    The continuation is printed as it is generated.

    Examples:
        llama3 complete "The capital of France is"
        llama3 complete "Once upon a time" -m Meta-Llama-3-8B -n 200
        llama3 complete "2 + 2 =" --temperature 0 --stop . --stop ";" --json
        cat story.txt | llama3 complete -
    """
    if logprobs and not json:
        raise ValueError("--logprobs needs --json")
    check_count("--max_gen_len", max_gen_len)
    text = _read_prompt(prompt, prompt_file) if job.is_leader() else None
    llama = open_model(checkpoint, build)
    text = tensor_parallel.broadcast_json(text)
    options = asdict(sampling) | {"max_gen_len": max_gen_len, "stop": stop or []}
    stream = llama.text_stream(text, logprobs=logprobs, **options)
    if json:
        _print_as_json(stream, text)
    else:
        _print_as_generated(stream, max_gen_len)


def _read_prompt(prompt: str | None, file: str | None) -> str:
    """The text of PROMPT, of a file, or of standard input.

    Raises:
        ValueError: none or several are given, or it is not UTF-8.
    """
    if (prompt is None) == (file is None):
        raise ValueError(
            "complete takes either PROMPT, the text to continue, or --prompt_file: type "
            '`llama3 complete "The capital of France is"`'
        )
    if file is not None:
        return read_text(file)
    return _read_stdin() if prompt == "-" else str(prompt)


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"standard input is not text in UTF-8: byte {e.start + 1}") from None


def _print_as_generated(stream: Stream, max_gen_len: int) -> None:
    for piece in stream:
        if job.is_leader():
            print_text(piece.text)
    if job.is_leader():
        print(flush=True)
        if stream.generation.finish_reason == "length":
            n = len(stream.generation.ids)
            flag = "--max_gen_len" if n >= max_gen_len else "--max_seq_len"
            print_remark(f"cut after {n} tokens; a larger {flag} gives more")


def _print_as_json(stream: Stream, prompt: str) -> None:
    text = "".join(piece.text for piece in stream)
    request, generation = stream.request, stream.generation
    result: dict[str, Any] = {
        "prompt": prompt,
        "generation": text,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": len(request.prompt),
        "tokens": generation.ids,
    }
    if request.logprobs:
        result["logprobs"] = generation.generated_logprobs
    if job.is_leader():
        print_json(result)


def perplexity(
    file: Annotated[str, "a text file in UTF-8; - is standard input"],
    *,
    max_seq_len: Annotated[
        int | None, "tokens of the sliding window; by default as trained, at most 4096"
    ] = None,
    stride: Annotated[
        int | None,
        "tokens that the window moves each time; by default half of it. All but the first "
        "tokens are predicted from at least max_seq_len - stride tokens",
    ] = None,
    json: Annotated[bool, "print one JSON object"] = False,
    checkpoint: CheckpointFlags,
    build: Annotated[
        BuildOptions, Only("max_batch_size", "quantize", "device", "dtype", "adapter")
    ],
) -> None:
    """Measure how well a model predicts a text.

    Perplexity compares models with the same tokenizer, bits per byte any models.

    Examples:
        llama3 perplexity book.txt -m Meta-Llama-3-8B
        llama3 perplexity book.txt --max_seq_len 512 --quantize int8
    """
    text = _read_stdin() if file == "-" else read_text(file)
    if max_seq_len is not None:
        stride = check_windows(max_seq_len, stride)
        max_seq_len = min(max_seq_len, len(text.encode()) + 2)  # a text has no more tokens
        stride = min(stride, max_seq_len - 1)
    llama = open_model(checkpoint, replace(build, max_seq_len=max_seq_len))
    result = llama.perplexity(tensor_parallel.broadcast_json(text), stride=stride)
    if job.is_leader():
        print(result.as_json() if json else result)
