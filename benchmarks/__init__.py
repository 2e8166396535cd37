"""Benchmarks, each with a required value (bar) per measurement. `python -m benchmarks` runs them all."""
