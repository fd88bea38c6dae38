"""Puts one model's abstain head onto another: tilelli splice --head DIR --onto DIR OUT.

What comes out generates what the model of --onto does, to the bit: the head has no part in that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax import store
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.files import new_directory
from tilelli_jax.models.abstain import head_of, with_head


@command
def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="tilelli splice", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True, metavar="DIR",
                        help="model directory with the head")
    parser.add_argument("--onto", type=Path, required=True, metavar="DIR",
                        help="model directory that gets it, in place of its own if it has one")
    parser.add_argument("out", type=Path, metavar="OUT",
                        help="model directory to write; must not be there yet")
    options = parser.parse_args(argv)
    splice(options.head, options.onto, options.out)
    print(f"{options.out}: {options.onto} with the abstain head of {options.head}")
    return 0


def splice(head: Path, onto: Path, out: Path) -> None:
    """Writes the model of `onto` with the abstain head of `head`.

    Raises:
        InputError: `out` already exists, or one of the models cannot give or take a head.
    """
    if out.exists():  # before the models are read
        raise InputError(f"{out}: already exists; choose another OUT")
    try:
        found = head_of(store.load(head))
    except InputError as error:
        raise _named(head, error) from None
    try:
        made = with_head(store.load(onto), found)
    except InputError as error:
        raise _named(onto, error) from None
    with new_directory(out) as path:
        store.save(made, path)


def _named(path: Path, error: InputError) -> InputError:
    return error if str(error).startswith(str(path)) else InputError(f"{path}: {error}")
