"""From the files of a source to the batches of a model."""
