"""Conversion of sources to manifests and features datasets."""
