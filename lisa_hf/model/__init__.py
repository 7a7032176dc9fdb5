"""Model, processor and pipeline. This folder travels to the Hub, so it imports nothing else of `lisa_hf`."""
