"""Checkpoints in and out: PyTorch files and Hugging Face directories ⇄ model directories."""

from tilelli_jax import interrupts

interrupts.handle_from_start(__name__)
