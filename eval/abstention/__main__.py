"""`python -m eval.abstention` in a clone: the command `tilelli abstention`."""

import sys

from tilelli_jax.__main__ import run_in_clone

if __name__ == "__main__":
    sys.exit(run_in_clone("abstention", __package__))
