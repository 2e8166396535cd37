"""Interfaces of encoders, captioners and rankers (image-text retrieval), and the families that provide such models."""
