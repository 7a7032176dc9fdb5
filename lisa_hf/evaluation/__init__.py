"""Metrics, benchmarks, predictions and pictures of them."""
