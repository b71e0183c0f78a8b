"""The suites' environment: Python and JavaScript packages, llama.cpp's tests, an export of the
demo model. Everything is in `.cache/conformance`, made once, and again when the pinned versions
change.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from os import environ
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
CACHE = ROOT / ".cache" / "conformance"
PYTHON = CACHE / "python" / "bin" / "python"
NODE = CACHE / "node"
NODE_PACKAGES = ("openai@6.48.0", "compatcanary@0.2.2")  # without dependencies of their own
LLAMA_CPP_PYTHON = "llama_cpp_python-0.3.36"
LLAMA_CPP_TESTS = (
    CACHE / "llama.cpp" / LLAMA_CPP_PYTHON / "vendor" / "llama.cpp" / "tools" / "server" / "tests"
)
HF_EXPORT = CACHE / "demo-hf"


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, cwd=cwd, check=True)


def pip(*arguments: str | Path) -> None:
    more = shlex.split(environ.get("PIP_ARGS", ""))
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, "-q", *more)


def python_packages() -> None:
    run(sys.executable, "-m", "venv", "--clear", CACHE / "python")
    pip("install", "-c", ROOT / "constraints.txt", "-r", HERE / "requirements.txt")


def node_packages() -> None:
    run("npm", "install", "--no-audit", "--no-fund", "--prefix", NODE, *NODE_PACKAGES)


def llama_cpp_tests() -> None:
    """The server tests in the source distribution of llama-cpp-python; nothing of it is built."""
    folder = CACHE / "llama.cpp"
    requirement = LLAMA_CPP_PYTHON.replace("python-", "python==")
    pip("download", "--no-deps", "--no-binary", ":all:", "-d", folder, requirement)
    with tarfile.open(folder / f"{LLAMA_CPP_PYTHON}.tar.gz") as archive:
        tests = str(LLAMA_CPP_TESTS.relative_to(folder))
        members = [m for m in archive.getmembers() if m.name.startswith(f"{tests}/")]
        archive.extractall(folder, members, filter="data")
    (folder / f"{LLAMA_CPP_PYTHON}.tar.gz").unlink()


def hf_export() -> None:
    """The demo model in the layout of Hugging Face, the weights as stored (bf16)."""
    from llama.checkpoints.demo_model import ensure_demo_model

    llama3 = (sys.executable, "-m", "llama", "convert", "--quiet", "--force")
    run(*llama3, "--to", "hf", str(ensure_demo_model()), HF_EXPORT)


def once(name: str, make: Callable[[], None], key: str) -> None:
    """Call `make`, unless it was called before with the same `key`."""
    stamp = CACHE / f"{name}.stamp"
    if not stamp.is_file() or stamp.read_text() != key:
        make()
        stamp.write_text(key)


def prepare() -> None:
    """Install what is missing.

    Raises:
        RuntimeError: npm is missing, or Python is older than 3.11.
    """
    if shutil.which("npm") is None:
        raise RuntimeError("npm is missing: install Node.js 20 or newer")
    if sys.version_info < (3, 11):
        raise RuntimeError("trustedrouter-provider-check needs Python 3.11 or newer")
    CACHE.mkdir(parents=True, exist_ok=True)
    pins = (HERE / "requirements.txt").read_text() + (ROOT / "constraints.txt").read_text()
    once("python", python_packages, pins)
    once("node", node_packages, " ".join(NODE_PACKAGES))
    once("llama.cpp", llama_cpp_tests, LLAMA_CPP_PYTHON)
    once("demo-hf", hf_export, (ROOT / "llama/checkpoints/formats/hf_export.py").read_text())
