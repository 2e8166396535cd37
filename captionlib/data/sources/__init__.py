"""Readers of input datasets, one module per format. Each yields images with reference captions as `ImageRecord`s."""
