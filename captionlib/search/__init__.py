"""Search: SQL over datasets, and an index of captions and embeddings."""
