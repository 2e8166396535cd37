"""Checkpoints: trained models saved to and loaded from folders."""
