"""Read-only SQL over a dataset with DuckDB, safe for queries from untrusted users."""
