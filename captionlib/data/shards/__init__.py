"""Datasets as folders of Parquet shards: schemas, reading, writing, resuming and inspection."""
