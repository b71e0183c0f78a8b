"""Options as fields of frozen dataclasses: a default and a help text, each written once.

Signatures, command-line flags and documentation are derived from these fields.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and a help text, `field.metadata["help"]`."""
    return field(default=default, metadata={"help": help})
