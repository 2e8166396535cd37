"""Data: sources, images, sharded datasets, text and training batches."""
