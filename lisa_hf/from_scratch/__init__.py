"""Tiny randomly initialized models, for the quick start and the tests only.

They train within minutes thanks to an initialization for tiny models, Muon, and a low text-loss weight.
"""
