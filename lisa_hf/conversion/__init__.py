"""Original LLaVA, SAM and LISA checkpoints to the format of transformers."""
