"""Sources of images and captions converted to datasets."""
