"""Where images and their captions come from: one module a family of sources, each a generator of `ManifestRow`."""
