"""Copies one model's abstain head onto another: tilelli splice --head DIR --onto DIR OUT.

The new model generates exactly the same text as the model of --onto: the head does not affect generation.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import new_directory
from tilelli_jax.loading import store
from tilelli_jax.loading.model_card import CardInfo
from tilelli_jax.models.abstain import attach_head, get_head


@command
def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="tilelli splice", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True, metavar="DIR",
                        help="model directory with the head")
    parser.add_argument("--onto", type=Path, required=True, metavar="DIR",
                        help="model directory that gets the head; it replaces its own, if it has one")
    parser.add_argument("out", type=Path, metavar="OUT",
                        help="model directory to write; must not exist")
    options = parser.parse_args(argv)
    splice(options.head, options.onto, options.out, shlex.join(["tilelli", "splice", *argv]))
    print(f"{options.out}: {options.onto} with the abstain head of {options.head}")
    return 0


def splice(head: Path, onto: Path, out: Path, command_line: str = "") -> None:
    """Writes the model of `onto` with the abstain head of `head`; the model card names the command line.

    Raises:
        InputError: `out` already exists, or a model has no head or cannot have one.
    """
    if out.exists():  # before the models are read
        raise InputError(f"{out}: already exists; choose another OUT")
    try:
        abstain_head = get_head(store.load(head))
    except InputError as error:
        raise _with_path(head, error) from None
    try:
        model = attach_head(store.load(onto), abstain_head)
    except InputError as error:
        raise _with_path(onto, error) from None
    with new_directory(out) as path:
        store.save(model, path, CardInfo(
            made_from=f"The model {onto} with the abstain head of {head}.", command=command_line))


def _with_path(path: Path, error: InputError) -> InputError:
    return error if str(error).startswith(str(path)) else InputError(f"{path}: {error}")
