"""Readers for sources of images and reference captions: one module per format, each a generator of `ManifestRow`."""
