"""The file of the compiled kernels: where it is, whether it may be loaded, and compiling it once.

A library is code, so it is loaded only from a folder that no other user can write, and only if its
content has the digest that is stored beside it. Knows nothing about the operators.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from llama.common.files import check_writable

log = logging.getLogger("llama")

HERE = Path(__file__).parent
SOURCES, HEADERS = sorted(HERE.glob("*.cpp")), sorted(HERE.glob("*.h"))
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-w"]
PREFIX = "llama3_kernels_"  # of every file and folder that this module makes
PATIENCE = 900.0  # seconds to wait for another process that compiles
REMEDY = "set TORCH_EXTENSIONS_DIR to a folder of your own"


def library_path() -> Path:
    """The file of the compiled kernels, in TORCH_EXTENSIONS_DIR or else in the user's cache.

    Its name depends on everything that it is compiled from and with.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        # Below the folder of torch's own extensions, which a umask of 002 opens to a group.
        folder = str(Path(cache) / "torch_extensions" / "llama3")
    inputs = [path.read_bytes() for path in SOURCES + HEADERS]
    command = [*_compiler_words(), *FLAGS, _abi()]
    inputs += [text.encode() for text in (*command, torch.__version__, platform.machine())]
    digest = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    return Path(folder) / f"{PREFIX}{digest}.so"


def digest_path(library: Path) -> Path:
    """The file with the SHA-256 of `library`, in hexadecimal."""
    return library.with_name(f"{library.name}.sha256")


def compiler() -> list[str]:
    """The C++ compiler's command line: the environment variable CXX, else g++, else c++."""
    command = _compiler_words()
    if shutil.which(command[0]):
        return command
    if "CXX" not in os.environ and shutil.which("c++"):
        return ["c++"]
    raise FileNotFoundError(f"no C++ compiler {command[0]!r}; install g++ or set CXX")


def _compiler_words() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _abi() -> str:
    return f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"


def open_library() -> BinaryIO:
    """The compiled kernels, checked and open for reading; compiled first where that is needed.

    Of several processes that call this at once, one compiles and the others wait for it.

    Raises:
        OSError: other users can write the folder, or this one cannot, or there is no compiler.
        RuntimeError, subprocess.SubprocessError: compiling failed.
    """
    library = library_path()
    check_private(library.parent)
    if (file := open_intact(library)) is not None:
        return file
    command = compiler()
    _make_folder(library.parent)
    with _one_at_a_time(library.parent) as alone:
        if alone:
            _remove_leftovers(library.parent)
        if (file := open_intact(library)) is not None:  # another process was faster
            return file
        if library.exists():
            log.info("%s is damaged or not this user's own; compiling it again", library)
        _compile(command, library)
    if (file := open_intact(library)) is None:
        raise OSError(f"{library} changed while it was written; {REMEDY}")
    return file


def check_private(folder: Path) -> None:
    """Check that no other user but root can put files into `folder`, which need not exist.

    Raises:
        PermissionError: another user can; the message says what to do.
    """
    try:
        status = folder.stat()
    except OSError:  # missing, or below a file: creating it says so
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{folder} belongs to another user (id {status.st_uid}); {REMEDY}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"other users can write to {folder} (mode {stat.S_IMODE(status.st_mode):o}), and a "
            f"library in it would run as you: chmod go-w it, or {REMEDY}"
        )


def open_intact(library: Path) -> BinaryIO | None:
    """The open file `library`; None if it is missing, damaged, or could be another user's."""
    try:
        file = os.fdopen(os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except OSError:
        return None
    status = os.fstat(file.fileno())
    others = stat.S_IWGRP | stat.S_IWOTH
    own = status.st_uid in (os.geteuid(), 0) and not status.st_mode & others
    if stat.S_ISREG(status.st_mode) and own and _digest(file) == _stored_digest(library):
        file.seek(0)
        return file
    file.close()
    return None


def _digest(file: BinaryIO) -> str:
    return hashlib.sha256(file.read()).hexdigest()


def _stored_digest(library: Path) -> str | None:
    try:
        return digest_path(library).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as e:
        raise OSError(f"cannot write to {folder} ({e}); {REMEDY}") from e


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[bool]:
    """A block that one process at a time can be in; False where the file system has no locks.

    Raises:
        OSError: another process has been in it for too long.
    """
    import fcntl

    path, deadline, waiting = folder / f"{PREFIX}lock", time.monotonic() + PATIENCE, False
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        alone = False
        while not alone:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                if not waiting:
                    log.info("waiting for another process that compiles the CPU kernels")
                waiting = True
                if time.monotonic() > deadline:
                    raise OSError(f"another process keeps {path} locked; end that one") from None
                time.sleep(0.1)
            except OSError:
                break
        yield alone
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of processes that were killed. Call it with the lock."""
    for path in folder.glob(f"{PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _compile(command: list[str], library: Path) -> None:
    """Compile into a temporary folder, sync, then rename: a power cut leaves no partial file."""
    log.info("compiling CPU kernels, once (about 40 seconds)")
    torch_dir = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=PREFIX) as folder:
        linked, digest = Path(folder, "kernels.so"), Path(folder, "kernels.so.sha256")
        objects = {f"{folder}/{source.stem}.o": str(source) for source in SOURCES}
        compile_only = [*command, *FLAGS, _abi(), f"-I{torch_dir / 'include'}", "-c"]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda out: _run([*compile_only, objects[out], "-o", out]), objects))
        # Linked without -fopenmp: the threads must be those of the OpenMP that torch has loaded.
        libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*command, "-shared", *objects, *libraries, "-o", str(linked)])
        with open(linked, "rb") as file:
            digest.write_text(_digest(file) + "\n", encoding="ascii")
        for source, target in ((linked, library), (digest, digest_path(library))):
            source.chmod(0o644)  # whatever the umask
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            os.replace(source, target)


def _run(command: list[str]) -> None:
    """Run a compiler; a RuntimeError has the first line of its output that names an error."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no error message"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        remedy = "install g++, or set CXX to another compiler"
        raise RuntimeError(f"{command[0]} failed: {reason}; {remedy}")
