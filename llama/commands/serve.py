"""`llama3 serve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from llama.commands.model import CheckpointFlags, open_model
from llama.commands.options import Only
from llama.engine.sampling import Sampling
from llama.generation import BuildOptions
from llama.server.settings import ServerSettings

DEMO = "SmolLM2-135M-Instruct"


def serve(
    *,
    max_batch_size: Annotated[int, "most answers computed at once; more wait"] = 8,
    settings: ServerSettings,
    sampling: Sampling,
    checkpoint: CheckpointFlags,
    build: Annotated[
        BuildOptions, Only("max_seq_len", "seed", "quantize", "compile", "device", "dtype")
    ],
) -> None:
    """Serve a model over HTTP, as OpenAI's API does, with a chat page.

    The sampling flags are what requests get that set none. Ctrl-C ends it.

    Examples:
        llama3 serve
        llama3 serve -m Meta-Llama-3-8B-Instruct --max_batch_size 16 --quantize int8
        LLAMA3_API_KEY=secret llama3 serve --host 0.0.0.0 --allowed_hosts llama.example.org
    """
    from llama.server.serve import serve as run_server

    options = replace(build, max_batch_size=max_batch_size)
    run_server(
        settings,
        lambda: open_model(checkpoint, options),
        sampling,
        settings.model_name or model_name(checkpoint),
    )


def model_name(checkpoint: CheckpointFlags) -> str:
    """The name that requests use for a checkpoint: that of its folder, file or repository."""
    if checkpoint.hf is not None:
        return checkpoint.hf
    if checkpoint.ckpt_dir is None:
        return DEMO
    path = Path(checkpoint.ckpt_dir).resolve()
    return path.stem if path.suffix == ".gguf" else path.name
