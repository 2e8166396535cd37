"""What is read and written: manifests, images, shards, vocabularies, training batches."""
