"""Scores of captions and of rankings, and pages that show them."""
