"""Datasets: folders of Parquet shards that can be read, written, resumed and inspected."""
