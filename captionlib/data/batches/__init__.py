"""Batches for training: features, images or text, in a seeded order and bounded memory."""
