"""Exceptions that end a job of several processes. Importing them does not import torch."""

from __future__ import annotations


class RankError(Exception):
    """A failure of one rank, raised on every rank: the job is over."""


class Terminated(SystemExit):
    """SIGTERM arrived: torchrun sends it to the remaining ranks when one has ended."""
