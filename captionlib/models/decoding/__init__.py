"""Decoding: beam search, sampling, constraints and reranking."""
