"""Benchmarks: run as `python -m benchmarks.NAME`. Results are in benchmarks/results/."""
