"""The networks: encoders, captioners, decoding, and what a worker computes with them."""
