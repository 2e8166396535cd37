"""Interfaces of encoders, captioners and rankers, and the families of models that implement these interfaces.

A family is a provider of models, selected by the prefix of a model's address, such as `hf:`.
"""
