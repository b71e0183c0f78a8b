"""`llama3 version`."""

from __future__ import annotations


def version() -> None:
    """Print the version.

    Examples:
        llama3 version
    """
    from llama.common.version import __version__

    print(__version__)
