"""Image encoders, captioners, rankers (dual encoders for image-text retrieval), decoding and inference."""
