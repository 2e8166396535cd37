"""Read-only SQL over a dataset with DuckDB. SQL cannot change the dataset or read anything else."""
