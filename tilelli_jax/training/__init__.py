"""Training: one step, one loop, and what surrounds them (optimiser, checkpoints, logs, run directory)."""
