"""Runs `tilelli serve`: python -m tilelli_jax.serve --model PATH."""

from __future__ import annotations

import sys

from tilelli_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
