"""SQL over datasets by DuckDB, safe for untrusted users: it can only read, and only the dataset."""
