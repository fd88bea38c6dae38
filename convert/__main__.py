"""`python -m convert` in a clone runs the command `tilelli convert`."""

import sys

from tilelli_jax.__main__ import run_in_clone

if __name__ == "__main__":
    sys.exit(run_in_clone("convert", __package__))
