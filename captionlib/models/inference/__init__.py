"""Inference on shards: features, captions and embeddings."""
