"""Converts PyTorch files and Hugging Face directories to model directories, and back."""

from tilelli_jax.cli import interrupts

interrupts.handle_from_start(__name__)
