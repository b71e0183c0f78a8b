"""How the threads of OpenMP wait for work, chosen before torch is imported. Knows no verb."""

from __future__ import annotations

import os
import sys

# What a user may have set: OpenMP's own variable, GNU's, LLVM's and Intel's.
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# By default GNU's threads spin for 300,000 rounds (about 3 ms) before they sleep. Beside another
# busy process they then hold the cores that the working threads wait for; docs/performance.md has
# the figures of other counts.
SPINS = "1000"


def choose_waiting() -> None:
    """Let waiting threads sleep soon, unless the user has chosen or torch is imported already."""
    if "torch" not in sys.modules and not any(name in os.environ for name in SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = SPINS
