"""`tilelli COMMAND …`: every command of the project. `python -m tilelli_jax` is the same."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import NamedTuple

from tilelli_jax import interrupts
from tilelli_jax.errors import InputError, command


class Command(NamedTuple):
    """Where a command is, and what it does."""

    main: str  # MODULE:FUNCTION, imported when it runs: a listing must not wait for JAX
    summary: str


GROUPS: dict[str, dict[str, Command]] = {
    "start": {
        "demo": Command("eval.recall.command:demo", "two minutes: train a network, see what it knows"),
    },
    "train": {
        "train": Command("train:main", "train or fine-tune a network; train an autoencoder"),
        "data": Command("commands.data:main",
                        "write text as shards, for texts larger than memory"),
        "splice": Command("commands.splice:main", "copy the abstain head of one model onto another"),
    },
    "use": {
        "generate": Command("commands.generate:main", "continue text"),
        "chat": Command("commands.chat:main", "talk with a model in turns"),
    },
    "convert": {
        "convert": Command("convert.command:main", "read and write PyTorch and Hugging Face checkpoints"),
    },
    "study": {
        "recall": Command("eval.recall.command:main", "does a network know the answer before it answers?"),
        "recall predict": Command("eval.recall.command:predict", "P(knows) for your own questions"),
        "recall app": Command("eval.recall.command:app", "the same as a page for the browser"),
        "difficulty": Command("eval.difficulty.command:main",
                              "what inside a network predicts what it gets wrong?"),
        "difficulty published": Command("eval.difficulty.published.command:main",
                                        "recompute fm-difficulty-probe's tables from its files"),
        "abstention": Command("eval.abstention.command:main",
                              "can a network learn to say that it does not know?"),
        "abstention calibrate": Command("eval.abstention.command:calibrate",
                                        "choose a model's threshold for a rate of false alarms"),
        "claims": Command("eval.claims.command:main", "check what is claimed of a chat model"),
        "compare": Command("eval.comparison.command:main",
                           "train networks at equal budget; test the difference"),
    },
    "machine": {
        "doctor": Command("commands.doctor:main", "report what JAX finds here and what is wrong with it"),
        "launch-check": Command("commands.launch_check:main",
                                "compile a run for a TPU slice that is not here"),
    },
}
COMMANDS = {name: found for group in GROUPS.values() for name, found in group.items()}


@command
def main(argv: Sequence[str]) -> int:
    """Runs the command that `argv` names.

    Raises:
        InputError: there is none of that name.
    """
    if not argv:
        print(overview(), file=sys.stderr)
        return 2
    if argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"tilelli_jax {importlib.metadata.version('tilelli_jax')}")
        return 0
    return run(argv)


def run(argv: Sequence[str], in_clone: bool = False) -> int:
    """Runs a command; the longest name first, `recall predict` before `recall`.

    Args:
        in_clone: convert and eval are packages of their own.
    """
    for words in (2, 1):
        if found := COMMANDS.get(" ".join(argv[:words])):
            module, _, function = found.main.partition(":")
            if not in_clone or module.partition(".")[0] not in ("convert", "eval"):
                module = f"tilelli_jax.{module}"
            with interrupts.starting():
                called = getattr(importlib.import_module(module), function)
            return int(called(argv[words:]) or 0)
    near = difflib.get_close_matches(argv[0], [name for name in COMMANDS if " " not in name], 1)
    raise InputError(f"{argv[0]}: unknown command" + (f", did you mean {near[0]}?" if near else "")
                     + " (tilelli --help lists them)")


def run_in_clone(name: str, package: str | None) -> int:
    """The command behind `python -m eval.recall` and its like, which a clone has without an installation.

    Args:
        package: the caller's `__package__`.
    """
    in_clone = not (package or "").startswith("tilelli_jax")
    return command(lambda argv: run([*name.split(), *argv], in_clone))()


def overview() -> str:
    """One screen: every command in its group."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: tilelli COMMAND [options] [key=value …]", "", "Does a model know what it knows?"]
    for group, commands in GROUPS.items():
        lines += ["", group, *(f"  {name:{width}}{found.summary}" for name, found in commands.items())]
    lines += ["", "tilelli COMMAND --help lists its options and every key of its configuration."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
