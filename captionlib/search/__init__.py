"""Questions to the Parquet and to the index."""
