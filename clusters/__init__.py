"""Runs Flink, Spark and Prism clusters as local processes, for tests and benchmarks.

In production, an operator or a cloud provider runs the engine; the captionlib commands are the same. See
docs/how-to/clusters.md.
"""
