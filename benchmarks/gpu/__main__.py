"""Measure this library on a GPU, in order of worth, within a number of minutes.

    python -m benchmarks.gpu --minutes 8 --out gpu-results
    python -m benchmarks.gpu --parts tests,decode
    python -m benchmarks.gpu --rehearse        # tiny shapes, also without a GPU

Each part runs in a process of its own, which is ended at the part's limit. What it has measured by
then is kept. OUT/gpu.json is written after each part; OUT/PART.log has what the part printed.
Needs torch and this library; the part `transformers` needs transformers, `tests` pytest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu.parts import PARTS, chosen
from benchmarks.gpu.runner import run_parts, shown


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--out", default="gpu-results", help="the folder for results")
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("--parts", default="", help=f"some of, or the beginning of: {names}")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes; a CPU will do")
    flags = parser.parse_args()
    try:
        parts = chosen(flags.parts)
        result = run_parts(parts, flags.minutes * 60, Path(flags.out), flags.rehearse)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    print("\n".join(shown(result)), flush=True)


if __name__ == "__main__":
    main()
