"""Batches of features, images and text for training."""
