"""Rankers: images and sentences embedded in one space."""
