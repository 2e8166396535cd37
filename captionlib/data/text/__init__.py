"""Text: tokenization, vocabularies, pretrained word vectors and corpora."""
