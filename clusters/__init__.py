"""Flink, Spark and Prism clusters of local processes, for tests and benchmarks.

In production an operator or a cloud provider runs the engine; the commands stay the same. See docs/how-to/clusters.md.
"""
