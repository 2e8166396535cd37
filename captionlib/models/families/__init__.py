"""Interfaces of models, and the families of models that implement these interfaces.

The models are encoders (images to features), captioners (images to captions) and rankers (image-text retrieval).

A family is a provider of models, selected by the prefix of a model's address, such as `hf:`.
"""
