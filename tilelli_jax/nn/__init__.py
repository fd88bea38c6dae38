"""Building blocks: they know shapes and mathematics, and nothing of models, files or training."""
