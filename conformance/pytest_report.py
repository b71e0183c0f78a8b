"""Pytest plugin: leaves out the tests of CONFORMANCE_DESELECT (JSON: {pattern: reason}), and writes
every outcome to the file CONFORMANCE_REPORT, one JSON object a line.
"""

from __future__ import annotations

import json
import os

import pytest
from results import matches


def write(name: str, state: str, reason: str = "") -> None:
    with open(os.environ["CONFORMANCE_REPORT"], "a") as f:
        f.write(json.dumps({"name": name, "state": state, "reason": reason}) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons: dict[str, str] = json.loads(os.environ["CONFORMANCE_DESELECT"])
    kept, left_out, used = [], [], set()
    for item in items:
        pattern = next((p for p in reasons if matches(item.nodeid, p)), None)
        if pattern is None:
            kept.append(item)
        else:
            left_out.append(item)
            used.add(pattern)
            write(item.nodeid, "deselected", reasons[pattern])
    for pattern in reasons.keys() - used:
        write(pattern, "failed", "is in deselected.py, but no test has this name: remove it")
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        if report.when == "teardown" and report.outcome == "skipped":
            return
        reason = report.longreprtext.splitlines()[-1] if report.longreprtext else ""
        if report.failed and report.longrepr is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message.splitlines()[0] if crash is not None else reason
        state = "skipped" if report.outcome == "skipped" else report.outcome
        write(report.nodeid, state, reason)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        write(report.nodeid, "failed", report.longreprtext.splitlines()[-1])
