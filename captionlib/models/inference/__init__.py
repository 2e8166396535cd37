"""What a worker computes for one shard: features, captions and embeddings."""
