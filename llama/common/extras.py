"""How to install the packages of an extra of this library, in messages."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def install_line(extra: str) -> str:
    """The command that installs an extra, such as "hf".

    In a clone it names the clone's folder, so that it works in any folder.
    """
    if (ROOT / "pyproject.toml").is_file():
        return f"pip install -e '{ROOT}[{extra}]'"
    return f"pip install 'llama3[{extra}]'"
