"""Tokenization, vocabularies, pretrained word vectors and text corpora."""
