"""Training: tasks, losses, the update step and loop, optimisers, checkpoints, logs, run directories."""
