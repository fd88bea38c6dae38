"""`python -m eval.difficulty.published` in a clone: the command `tilelli difficulty published`."""

import sys

from tilelli_jax.__main__ import run_in_clone

if __name__ == "__main__":
    sys.exit(run_in_clone("difficulty published", __package__))
