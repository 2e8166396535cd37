"""Networks that predict the next word: captioners and language models."""
