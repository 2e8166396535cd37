"""Benchmarks with a bar for each measurement; `python -m benchmarks` runs them all."""
