"""`make conformance`: public test suites of OpenAI's wire against `llama3 serve` on the demo model.

    python conformance/run.py [SUITE ...]

Prints a table, and each unexpected failure with its reason. Exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby

from environment import prepare
from results import Result, table
from server import serving
from suites import LOGS, SUITES


def main() -> int:
    names = [suite.name for suite in SUITES]
    parser = argparse.ArgumentParser(description="Run public conformance suites.")
    parser.add_argument("suite", nargs="*", choices=[[], *names], help="by default all of them")
    chosen = parser.parse_args().suite or names
    prepare()
    LOGS.mkdir(exist_ok=True)
    outcomes: dict[str, list[Result]] = {}
    suites = [suite for suite in SUITES if suite.name in chosen]
    for number, (flags, group) in enumerate(groupby(suites, key=lambda suite: suite.flags)):
        with serving(LOGS / f"server-{number}.log", *flags) as server:
            for suite in group:
                print(f"+ {suite.name}", flush=True)
                try:
                    outcomes[suite.name] = suite.run(server)
                except Exception as e:  # the other suites still run
                    outcomes[suite.name] = [Result(suite.name, "failed", repr(e))]
    print(table(outcomes))
    failures = [
        (name, result)
        for name, results in outcomes.items()
        for result in results
        if result.state == "failed"
    ]
    for name, result in failures:
        print(f"{name}: {result.name}: {result.reason[:300]}")
    if failures:
        print(f"{len(failures)} unexpected failures; the logs are in {LOGS}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
