"""Flink, Spark and Prism clusters of local processes, for tests and benchmarks.

<<<<<<< HEAD
Not for production: there an operator or a cloud runs the engine, and the commands stay the same; see docs/how-to/clusters.md.
=======
In production an operator or a cloud provider runs the engine; the commands stay the same. See docs/clusters.md.
>>>>>>> integration
"""
