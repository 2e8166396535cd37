"""Families of models: what an encoder, a captioner and a ranker have to offer, and how they are found by address."""
