"""`python -m eval.recall` in a clone: the command `tilelli recall`."""

import sys

from tilelli_jax.__main__ import run_in_clone

if __name__ == "__main__":
    sys.exit(run_in_clone("recall", __package__))
