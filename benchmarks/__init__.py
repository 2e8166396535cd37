"""What the project is measured by; `python -m benchmarks` runs all of it."""
