"""Training captioners, rankers and language models."""
