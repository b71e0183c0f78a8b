"""Benchmarks: run as `python -m benchmarks.NAME`; results stand in docs/performance.md."""
