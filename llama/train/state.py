"""The folder of a training run: its settings, and the state for resuming.

OUT/                  the result with the lowest validation loss so far
  metrics.jsonl, loss.png
  train/              for resuming
    settings.json     the settings, and a digest of the data
    last.pt           trained weights and optimizer state of the last saved step
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama.common.files import read_json, replacing_file
from llama.common.torch_file import is_disk_error, load_torch
from llama.layers.lora import fill
from llama.train.settings import TrainerSettings


def refuse_existing(out: Path) -> None:
    """Check that `out` can become the folder of a new run; an empty folder there is removed.

    Raises:
        FileExistsError: something is there.
    """
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        is_run = (out / "train" / "settings.json").is_file()
        remedy = "continue the run in it with --resume, or choose" if is_run else "choose"
        raise FileExistsError(f"{out} exists already; {remedy} another folder for --out")


def record_settings(folder: Path, settings: TrainerSettings, ranks: int, data: str) -> None:
    """Write train/settings.json, which `check_resumable` reads and `lock_run` locks.

    Args:
        data: a digest of all that the batches depend on beside the settings.
    """
    values = dataclasses.asdict(settings) | {"ranks": ranks}
    text = json.dumps({"settings": values, "data": data}, indent=2, ensure_ascii=False) + "\n"
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train" / "settings.json").write_text(text, encoding="utf-8")


def check_resumable(out: Path, settings: TrainerSettings, ranks: int) -> str:
    """Check that the run in `out` can continue with these settings; return its digest of the data.

    Raises:
        FileNotFoundError: `out` contains no run.
        ValueError: settings or ranks differ; the message names all differences.
    """
    path = out / "train" / "settings.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{out} contains no run to resume; start one without --resume, in a new folder"
        )
    recorded = read_json(path)
    if not isinstance(recorded.get("settings"), dict) or "data" not in recorded:
        raise ValueError(f"{path} is damaged: it lacks the settings; start a new run")
    fields = dataclasses.asdict(settings).keys() | {"ranks"}
    if recorded["settings"].keys() != fields:
        raise ValueError(
            f"the run in {out} is of another verb or version; start one in a new folder"
        )
    differences = settings.differences(recorded["settings"], ranks)
    if differences:
        raise ValueError(f"the run in {out} cannot be resumed: {'; '.join(differences)}")
    return str(recorded["data"])


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """A block in which no other process of this machine can train in `out`.

    Raises:
        ValueError: another process does already.
    """
    with open(out / "train" / "settings.json", encoding="utf-8") as f:
        try:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains in {out}; wait for it, or stop it") from None
        except (ImportError, OSError):  # the system or the file system has no locks
            pass
        yield


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` with `torch.save`, replacing `path` atomically.

    Raises:
        OSError: the disk is full.
    """
    with replacing_file(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as e:  # what torch raises for a failed write
            raise OSError(f"{path} could not be written; is the disk full? ({e})") from e


def load_state(path: Path, module: nn.Module) -> dict[str, Any]:
    """Read a file of `save_state` that is to be loaded into `module`; pickled code is not executed.

    Raises:
        ValueError: the file is damaged, or is not the state of this module.
    """
    try:
        state = load_torch(path)
        check_state(state, module)
    except Exception as e:  # a damaged pickle may raise anything
        if is_disk_error(e):
            raise
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path} is damaged; start a new run ({reason})") from None
    assert isinstance(state, dict)
    return state


def check_state(state: Any, module: nn.Module) -> None:
    """Check each tensor of a training state against its parameter.

    The optimizer's fused kernel does not: it would write beyond a moment that is too small.

    Raises:
        ValueError: the first difference.
        KeyError, TypeError, AttributeError: the state lacks a part.
    """
    parameters = trained(module)
    step, moments = state["result"]["step"], state["optimizer"]["state"]
    if type(step) is not int or step < 1:
        raise ValueError(f"the step {step!r} is no number of updates")
    for kind, found in (("weights", state["weights"]), ("moments", moments)):
        for name in parameters.keys() ^ found.keys():
            raise ValueError(f"{name} has no {kind}" if name in parameters else f"unknown {name!r}")
    for name, parameter in parameters.items():
        _check_tensor(name, state["weights"][name], parameter.shape, parameter.dtype)
        if moments[name].keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the moments of {name} are {list(moments[name])}")
        _check_tensor(f"the step of {name}", moments[name]["step"], torch.Size(), torch.float32)
        if moments[name]["step"] != step:
            raise ValueError(f"{name} has other updates than the run's {step}")
        for moment in ("exp_avg", "exp_avg_sq"):
            found = moments[name][moment]
            _check_tensor(f"{moment} of {name}", found, parameter.shape, parameter.dtype)
        if (moments[name]["exp_avg_sq"] < 0).any():  # the next step takes its square root
            raise ValueError(f"exp_avg_sq of {name} has a negative number")


def _check_tensor(name: str, found: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise a ValueError unless `found` is a plain tensor of these, with finite numbers."""
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_nested:
        raise ValueError(f"{name} is not a plain tensor")
    if not found.is_contiguous():  # the optimizer's fused kernel reads it as if it was
        raise ValueError(f"{name} is not contiguous")
    if found.shape != shape or found.dtype != dtype or found.device.type != "cpu":
        raise ValueError(
            f"{name} is {list(found.shape)}, {found.dtype} on {found.device}, and must be "
            f"{list(shape)}, {dtype}"
        )
    if not found.isfinite().all():
        raise ValueError(f"{name} has a number that is not finite")


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; a shared one has its first name."""
    return {name: w for name, w in module.named_parameters() if w.requires_grad}


def gather_weights(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Unsharded trained weights by name, on the CPU. Every rank must call this.

    Args:
        keep: if False, return an empty dict.
    """
    return _whole(trained(module), keep)


def gather_state(module: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """Unsharded trained weights and moments by name, on the CPU. See `gather_weights`."""
    parameters = trained(module)
    moments = {name: _whole(optimizer.state[w], keep) for name, w in parameters.items()}
    return {"weights": _whole(parameters, keep), "optimizer": {"state": moments}}


def _whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    found = {}
    for name, x in tensors.items():
        x = x.detach()
        x = x.full_tensor() if isinstance(x, DTensor) else x
        if keep:
            found[name] = x.cpu()
    return found


@torch.no_grad()
def set_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `gather_state` returned on rank 0; every rank passes the same `state`.

    The options of the optimizer stay as they are: only its moments are loaded.
    """
    for name, w in trained(module).items():
        fill(w, state["weights"][name])
        moments = {"step": state["optimizer"]["state"][name]["step"].to(w.device)}
        for moment in ("exp_avg", "exp_avg_sq"):
            moments[moment] = torch.zeros_like(w)
            fill(moments[moment], state["optimizer"]["state"][name][moment])
        optimizer.state[w] = moments
