"""Conversion of input datasets to manifests (one row per image) and of imported features to features datasets."""
