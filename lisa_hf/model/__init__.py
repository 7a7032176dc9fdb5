"""The model, its processor and its pipeline. This folder travels to the Hub: it imports nothing else of `lisa_hf`."""
