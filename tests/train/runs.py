"""Reads a run directory's losses and checkpoints, and damages a checkpoint."""

from __future__ import annotations

from tilelli_jax.training.log import read_metrics


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")}


def damage(run_dir, step):
    """Truncates the largest of a checkpoint's array files."""
    largest = max((run_dir / "checkpoints" / str(step) / "state" / "d").iterdir(),
                  key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())
