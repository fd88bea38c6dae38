"""Evaluation with NumPy and scikit-learn: statistics, probes, figures, reports, and the studies."""

from tilelli_jax.cli import interrupts

interrupts.handle_from_start(__name__)
