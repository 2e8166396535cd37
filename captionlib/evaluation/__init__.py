"""Scores for captions and rankers (dual encoders for image-text retrieval), and web pages that show the scores."""
