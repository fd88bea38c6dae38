"""`python -m eval.comparison` in a clone: the command `tilelli compare`."""

import sys

from tilelli_jax.__main__ import run_in_clone

if __name__ == "__main__":
    sys.exit(run_in_clone("compare", __package__))
