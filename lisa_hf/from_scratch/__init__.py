"""Tiny models with random weights, for the quick start and the tests."""
