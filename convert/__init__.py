"""Checkpoints in and out: PyTorch files and Hugging Face directories ⇄ model directories."""
