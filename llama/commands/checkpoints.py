"""The verbs that read or write checkpoints and run no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.commands.model import check_local
from llama.commands.terminal import print_report
from llama.common.printable import printable_line

CHECKPOINT = "a checkpoint: Meta's or Hugging Face's folder, or a GGUF file"


def inspect(
    path: Annotated[str, CHECKPOINT],
    *,
    max_batch_size: Annotated[int, "rows of the KV cache"] = 1,
    max_seq_len: Annotated[
        int | None, "tokens of each row of the KV cache; by default as trained, at most 8192"
    ] = None,
) -> None:
    """Show a checkpoint's sizes and the memory that it needs.

    Of an adapter's folder it shows the base, the method and the sizes.

    Examples:
        llama3 inspect Meta-Llama-3-70B-Instruct --max_batch_size 4 --max_seq_len 8192
    """
    from llama.checkpoints.adapter import is_adapter
    from llama.checkpoints.adapter_report import describe_folder
    from llama.checkpoints.inspect import describe

    check_local(path)
    if is_adapter(path):
        print_report(describe_folder(path))
    else:
        print_report(describe(open_checkpoint(path), max_batch_size, max_seq_len))


def verify(path: Annotated[str, CHECKPOINT]) -> None:
    """Check every file of a checkpoint, or of an adapter.

    Prints one line for each problem; the exit code is 1 if there is any.

    Examples:
        llama3 verify Meta-Llama-3-8B
    """
    from llama.checkpoints.adapter import is_adapter
    from llama.checkpoints.adapter_report import adapter_problems
    from llama.checkpoints.verify import verify as find_problems

    check_local(path)
    adapter = is_adapter(path)
    problems = adapter_problems(path) if adapter else find_problems(path, open_checkpoint)
    if not problems and not adapter:
        try:
            open_tokenizer(open_checkpoint(path))
        except (ValueError, FileNotFoundError) as e:
            problems = [str(e)]
    lines = problems or [f"{path}: every check passed"]
    print_report("\n".join(map(printable_line, lines)))
    if problems:
        raise SystemExit(1)


def convert(
    src: Annotated[str, CHECKPOINT],
    dst: Annotated[str, "the folder to write"],
    *,
    to: Annotated[str, "meta (the official layout) or hf (Hugging Face)"] = "meta",
    mp: Annotated[int | None, "shards of the official layout; by default as many as SRC"] = None,
    dtype: Annotated[
        str | None, "auto, bf16, fp16 or fp32; by default (auto) what is stored (bf16 from a GGUF)"
    ] = None,
    force: Annotated[bool, "replace DST if it exists"] = False,
) -> None:
    """Write a checkpoint in another layout.

    Examples:
        llama3 convert Meta-Llama-3-8B llama-3-8b-hf --to hf
        llama3 convert model.Q4_K_M.gguf llama-from-gguf --dtype bf16
        llama3 convert Meta-Llama-3-8B llama-two-ranks --mp 2
    """
    from llama.checkpoints.convert import convert as convert_checkpoint

    check_local(src)
    print_report(convert_checkpoint(src, dst, to=to, mp=mp, dtype=dtype, force=force))


def quantize(
    src: Annotated[str, CHECKPOINT],
    dst: Annotated[str, "the folder to write"],
    *,
    scheme: Annotated[str, "int8, or int4 (4.5 bits a weight; the output layer 6.5)"],
    calibrate: Annotated[
        str | None,
        "a text file in UTF-8 like what the model will read: int4 then keeps what the layers "
        "compute from it, and is better at the same size",
    ] = None,
    windows: Annotated[
        int | None, "with --calibrate, the most windows of the text that are used; by default 128"
    ] = None,
    max_seq_len: Annotated[
        int | None, "with --calibrate, tokens of a window; by default 512"
    ] = None,
) -> None:
    """Write a checkpoint with weights of 8 or 4 bits.

    Examples:
        llama3 quantize Meta-Llama-3-8B-Instruct llama-3-8b-int4 --scheme int4
        llama3 quantize Meta-Llama-3-8B llama-3-8b-int4 --scheme int4 --calibrate my.txt
    """
    from llama.checkpoints.calibration import Calibration
    from llama.checkpoints.convert import quantize as quantize_checkpoint
    from llama.engine.scoring import read_text

    check_local(src)
    given = {"windows": windows, "max_seq_len": max_seq_len}
    options = {name: value for name, value in given.items() if value is not None}
    if calibrate is None and options:
        raise ValueError(f"--{next(iter(options))} needs --calibrate")
    calibration = None if calibrate is None else Calibration(read_text(calibrate), **options)
    print_report(quantize_checkpoint(src, dst, scheme, calibration))


def download(
    repo: Annotated[str, "a repository of the Hugging Face hub: OWNER/NAME, or its address"],
    dst: Annotated[str | None, "the folder to write; by default NAME"] = None,
    *,
    include: Annotated[
        str | None, "files to fetch, such as 'original/*'; by default what is needed to run"
    ] = None,
) -> None:
    """Download a checkpoint from the Hugging Face hub, and verify it.

    Examples:
        llama3 download meta-llama/Llama-3.2-1B-Instruct
    """
    from llama.checkpoints.download import download as download_checkpoint

    folder = download_checkpoint(repo, Path(dst) if dst else None, include)
    verify(str(folder.absolute()))


def demo() -> None:
    """Fetch the demo model if it is not there yet, and print its folder.

    Examples:
        llama3 demo
    """
    from llama.checkpoints.demo_model import ensure_demo_model

    print(ensure_demo_model())
