"""Clusters of real processes on this machine's loopback interface, from packages, to test and to measure against.

Not for production: there an operator or a cloud runs the engine, and the commands stay the same; see docs/how-to/clusters.md.
"""
