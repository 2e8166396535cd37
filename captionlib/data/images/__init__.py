"""Fetches images from their addresses and decodes them, within limits on size, time and memory."""
