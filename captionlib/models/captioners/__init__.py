"""Captioners and language models: the networks."""
