"""Data: input formats, images, datasets of Parquet shards, text and training batches."""
