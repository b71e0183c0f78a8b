"""`llama3 complete` and `llama3 perplexity`."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict, replace
from typing import Annotated, Any

from llama.commands.model import BuildFlags, CheckpointFlags, open_model
from llama.commands.options import Only
from llama.commands.terminal import print_text
from llama.distributed import job, tensor_parallel
from llama.engine.request import check_count
from llama.engine.sampling import Sampling
from llama.engine.scoring import check_windows, read_text
from llama.generation import BuildOptions, Stream


def complete(
    prompt: Annotated[str, "the text to continue, quoted"],
    *,
    max_gen_len: Annotated[int, "most tokens to generate"] = 64,
    stop: Annotated[str | None, "a text that ends the continuation"] = None,
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
        llama3 complete "Once upon a time" --ckpt_dir Meta-Llama-3-8B --max_gen_len 200
        llama3 complete "2 + 2 =" --temperature 0 --stop . --json
    """
    if logprobs and not json:
        raise ValueError("--logprobs needs --json")
    check_count("--max_gen_len", max_gen_len)
    stream = open_model(checkpoint, build).text_stream(
        prompt,
        max_gen_len=max_gen_len,
        stop=[] if stop is None else [stop],
        logprobs=logprobs,
        **asdict(sampling),
    )
    if json:
        _print_as_json(stream, prompt)
    else:
        _print_as_generated(stream)


def _print_as_generated(stream: Stream) -> None:
    for piece in stream:
        if job.is_leader():
            print_text(piece.text)
    if job.is_leader():
        print(flush=True)


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
        print(json_module.dumps(result, ensure_ascii=False), flush=True)


def perplexity(
    file: Annotated[str, "a text file in UTF-8"],
    *,
    context: Annotated[
        int | None, "tokens of the sliding window; by default as trained, at most 4096"
    ] = None,
    stride: Annotated[
        int | None,
        "tokens that the window moves each time; by default half of it. All but the first "
        "tokens are predicted from at least context - stride tokens",
    ] = None,
    json: Annotated[bool, "print one JSON object"] = False,
    checkpoint: CheckpointFlags,
    build: Annotated[BuildOptions, Only("max_batch_size", "quantize", "device", "dtype")],
) -> None:
    """Measure how well a model predicts a text.

    Perplexity compares models with the same tokenizer, bits per byte any models.

    Examples:
        llama3 perplexity book.txt --ckpt_dir Meta-Llama-3-8B
        llama3 perplexity book.txt --context 512 --quantize int8
    """
    text = read_text(file)
    if context is not None:
        stride = check_windows(context, stride)
        context = min(context, len(text.encode()) + 2)  # a text has no more tokens than that
        stride = min(stride, context - 1)
    llama = open_model(checkpoint, replace(build, max_seq_len=context))
    result = llama.perplexity(tensor_parallel.broadcast_json(text), stride=stride)
    if job.is_leader():
        print(result.as_json() if json else result)
