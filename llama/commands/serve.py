"""`llama3 serve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from llama.checkpoints.adapter import adapter_folder
from llama.checkpoints.formats.peft import CONFIG_FILE, read_peft_config
from llama.commands.model import CheckpointFlags, open_model
from llama.commands.options import Only
from llama.engine.sampling import Sampling
from llama.generation import BuildOptions
from llama.server.settings import ServerSettings

DEMO = "SmolLM2-135M-Instruct"


def serve(
    *,
    adapter: Annotated[
        list[str] | None, "an adapter that requests name as their model, NAME=DIR; may be repeated"
    ] = None,
    max_batch_size: Annotated[int, "most answers computed at once; more wait"] = 8,
    settings: ServerSettings,
    sampling: Sampling,
    checkpoint: CheckpointFlags,
    build: Annotated[
        BuildOptions,
        Only(
            *("max_seq_len", "seed", "quantize", "compile", "speculate", "draft"),
            *("device", "dtype"),
        ),
    ],
) -> None:
    """Serve a model over HTTP, as OpenAI's API does, with a chat page.

    The sampling flags are what requests get that set none. Ctrl-C ends it.

    Examples:
        llama3 serve
        llama3 serve -m Meta-Llama-3-8B-Instruct --max_batch_size 16 --quantize int8
        llama3 serve -m Llama-3.2-1B --adapter sql=adapters/1 --adapter law=adapters/2
        LLAMA3_API_KEY=secret llama3 serve --host 0.0.0.0 --allowed_hosts llama.example.org
    """
    from llama.server.serve import serve as run_server

    name, adapters = settings.model_name or model_name(checkpoint), named_adapters(adapter or [])
    if only := whole_adapter(adapters):
        options, name = replace(build, adapter=adapters[only]), only
    else:
        options = replace(build, adapters=adapters or None)
    if name in adapters and not only:
        raise ValueError(f"--adapter {name}: the base has this name; use --adapter OTHER=DIR")
    options = replace(options, max_batch_size=max_batch_size)
    run_server(settings, lambda: open_model(checkpoint, options), sampling, name)


def model_name(checkpoint: CheckpointFlags) -> str:
    """The name that requests use for a checkpoint: that of its folder, file or repository."""
    if checkpoint.hf is not None:
        return checkpoint.hf
    if checkpoint.ckpt_dir is None:
        return DEMO
    path = Path(checkpoint.ckpt_dir).resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def named_adapters(flags: list[str]) -> dict[str, Path]:
    """{name: folder} of flags NAME=DIR, or DIR, whose name is that of the folder.

    Raises:
        FileNotFoundError: there is no adapter in a folder.
        ValueError: a name is empty, not printable, too long, or given twice.
    """
    found: dict[str, Path] = {}
    for flag in flags:
        name, equals, folder = flag.partition("=")
        if not equals or Path(flag).is_dir():
            name, folder = Path(flag).resolve().name, flag
        if not folder or not name or len(name) > 1000 or not name.isprintable():
            raise ValueError(f"--adapter must be NAME=DIR, or the folder DIR, not {flag!r}")
        if name in found:
            raise ValueError(f"--adapter {name}: two have this name; use --adapter OTHER=DIR")
        found[name] = adapter_folder(folder)
    return found


def whole_adapter(adapters: dict[str, Path]) -> str | None:
    """The name of the only adapter, if it has an embedding or an output of its own.

    Raises:
        ValueError: one of several has; requests cannot choose it.
    """
    for name, folder in adapters.items():
        if not read_peft_config(folder / CONFIG_FILE).whole:
            continue
        if len(adapters) > 1:
            raise ValueError(
                f"--adapter {name}: {folder} has an embedding or an output of its own, which "
                "requests cannot choose; serve it alone, or merge it into a checkpoint: "
                "llama3 merge"
            )
        return name
    return None
