"""Images: fetched from their addresses and decoded to pixels, within limits on size, time and memory."""
