"""Scores of captions and rankers, and web pages that show them."""
