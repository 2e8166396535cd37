"""SQL queries over datasets, and an index for searching captions and image embeddings."""
