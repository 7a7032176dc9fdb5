"""Convert original LLaVA, SAM and LISA checkpoints to transformers' format."""
