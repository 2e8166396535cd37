"""Captions and indexes millions of images; see README.md for the flow."""

__version__ = "0.1.0"
