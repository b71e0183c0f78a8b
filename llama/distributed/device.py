"""The device of this rank and the dtype to compute in. Knows no model."""

from __future__ import annotations

import torch

from llama.common.dtypes import parse_dtype
from llama.distributed import job


def pick_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the first that is available of cuda, mps and cpu. A rank gets its own GPU.

    Raises:
        ValueError: unknown device, or it is not available.
    """
    if device is None or device == "auto":
        # Ranks cannot communicate on mps.
        mps = torch.backends.mps.is_available() and job.is_single_process()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use 'cuda', 'mps' or 'cpu'") from None
    if picked.type == "meta" or (picked.type == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"device {str(picked)!r} cannot be used here; use 'cpu'")
    if picked.type == "cuda":
        return _pick_gpu(picked)
    return picked


def _pick_gpu(device: torch.device) -> torch.device:
    """`device`; without an index, the GPU of this process's local rank under torchrun.

    Raises:
        ValueError: there is no such GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda' was requested, but torch finds no GPU here; use 'cpu'")
    by_rank = device.index is None and job.is_launched()
    if by_rank:
        device = torch.device("cuda", job.local_rank())
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"torch finds {count} GPU(s) here, and no {device}: start at most as many ranks as the "
            "machine has GPUs, or hide them (CUDA_VISIBLE_DEVICES=) to use its CPU"
        )
    if by_rank:
        torch.cuda.set_device(device)  # nccl communicates on the current device
    return device


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`dtype`, as a torch dtype or by name; None or "auto": the best for `device`.

    The best is bfloat16 if the device computes in it, else float16 (GPU) or float32 (CPU).

    Raises:
        TypeError: neither a floating-point dtype of torch nor a name.
        ValueError: unknown name.
    """
    chosen = parse_dtype(dtype)
    if chosen is not None:
        return chosen
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    if device.type == "cpu":
        mkldnn = torch.backends.mkldnn.is_available()
        native = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16
