"""Trains captioners, rankers (dual encoders for image-text retrieval) and language models."""
