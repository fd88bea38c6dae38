"""Data sets: byte text, pairs of prompt and response, and activations, read as Grain pipelines."""
