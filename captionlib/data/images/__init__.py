"""Fetches images from their addresses and decodes them, with limits on size, time and memory."""
