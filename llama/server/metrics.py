"""Figures for Prometheus, in a registry of their own. Knows no URL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llama.server.worker import Worker

if TYPE_CHECKING:
    from llama.server.ticket import Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts requests, and reads the engine's counts when asked."""

    def __init__(self, worker: Worker):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._worker = worker
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "llama3_requests", "HTTP requests.", ["path", "status"], registry=self._registry
        )
        self._duration = Histogram(
            "llama3_request_seconds",
            "From a request's headers to the end of its response.",
            ["path"],
            registry=self._registry,
            buckets=SECONDS,
        )
        self._first = Histogram(
            "llama3_time_to_first_token_seconds",
            "From queueing to an answer's first token.",
            registry=self._registry,
            buckets=SECONDS,
        )
        self._registry.register(self)
        worker.on_end = self.count_answers

    def counter_of(self, paths: Iterable[str]) -> Callable[[str, int, float], None]:
        """Counts a request, given its path, status and seconds."""
        known = frozenset(paths)

        def count(path: str, status: int, seconds: float) -> None:
            path = path if path in known else "other"  # no figure of its own for any path
            self._requests.labels(path, str(status)).inc()
            self._duration.labels(path).observe(seconds)

        return count

    def count_answers(self, ticket: Ticket) -> None:
        """Called for each ticket that has ended."""
        for answer in ticket.answers:
            queued, first = answer.generation.queued_at, answer.generation.first_id_at
            if queued is not None and first is not None:
                self._first.observe(first - queued)

    def collect(self) -> Iterator[Any]:
        """The engine's counts."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        yield GaugeMetricFamily("llama3_up", "1: answers.", self._worker.state == "ready")
        if self._worker.state != "ready":
            return
        found = self._worker.engine.metrics()
        for name, help in GAUGES.items():
            yield GaugeMetricFamily(f"llama3_{name}", help, getattr(found, name))
        for name, help in COUNTERS.items():
            yield CounterMetricFamily(f"llama3_{name}", help, getattr(found, name))
        finished = CounterMetricFamily(
            "llama3_finished", "Answers that ended, by reason.", labels=["reason"]
        )
        for reason, count in found.finished.items():
            finished.add_metric([reason], count)
        yield finished

    def text(self) -> bytes:
        """All figures in the text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


GAUGES = {
    "waiting": "Answers that wait for a slot.",
    "running": "Answers that have a slot.",
    "slots": "Slots.",
}
COUNTERS = {
    "steps": "Steps of the engine.",
    "prompt_tokens": "Tokens of prompts, also those that were cached.",
    "cached_tokens": "Tokens of prompts that were cached.",
    "generated_tokens": "Tokens generated.",
    "proposed_tokens": "Tokens that speculation has proposed.",
    "accepted_tokens": "Proposed tokens that were right.",
    "prefill_seconds": "Seconds in computing prompts.",
    "decode_seconds": "Seconds in generating.",
}
