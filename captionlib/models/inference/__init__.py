"""Inference on dataset shards: computes features, captions and embeddings."""
