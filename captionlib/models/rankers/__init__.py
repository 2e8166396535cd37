"""Rankers: dual encoders for image-text retrieval."""
