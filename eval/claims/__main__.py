"""`python -m eval.claims` in a clone: the command `tilelli claims`."""

import sys

from tilelli_jax.__main__ import run_in_clone

if __name__ == "__main__":
    sys.exit(run_in_clone("claims", __package__))
