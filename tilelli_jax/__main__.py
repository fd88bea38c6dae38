"""Runs `tilelli COMMAND …`; `python -m tilelli_jax COMMAND …` is the same."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import NamedTuple

from tilelli_jax.cli import allocator, interrupts, program_cache
from tilelli_jax.cli.command import command
from tilelli_jax.errors import InputError


class Command(NamedTuple):
    """A command's function, and its summary for the overview."""

    main: str  # MODULE:FUNCTION, imported only when it runs, so that the overview does not wait for JAX
    summary: str


GROUPS: dict[str, dict[str, Command]] = {
    "start": {
        "demo": Command("eval.recall.command:demo", "train a network and predict P(knows) (2 to 4 minutes)"),
    },
    "train": {
        "train": Command("train:main", "train or fine-tune a network, or train an autoencoder"),
        "data": Command("commands.data:main",
                        "write text as shards, also text larger than memory"),
        "splice": Command("commands.splice:main", "copy the abstain head of one model onto another"),
    },
    "use": {
        "generate": Command("commands.generate:main", "continue text"),
        "chat": Command("commands.chat:main", "chat with a model in turns"),
        "serve": Command("eval.recall.serve:main", "serve a network over HTTP, with P(knows) in every reply"),
    },
    "convert": {
        "convert": Command("convert.command:main", "read and write PyTorch and Hugging Face checkpoints"),
    },
    "study": {
        "recall": Command("eval.recall.command:main",
                          "predict from activations whether answers will be correct"),
        "recall predict": Command("eval.recall.command:predict", "predict P(knows) for your own questions"),
        "recall evaluate": Command("eval.recall.command:evaluate_shipped",
                                   "make the report of a shipped study again"),
        "recall compare": Command("eval.recall.command:compare", "compare estimators over finished studies"),
        "recall app": Command("eval.recall.command:app", "predict P(knows) in a browser page"),
        "difficulty": Command("eval.difficulty.command:main",
                              "do activations predict what a network gets wrong?"),
        "difficulty published": Command("eval.difficulty.published.command:main",
                                        "recompute fm-difficulty-probe's tables from its files"),
        "abstention": Command("eval.abstention.command:main",
                              "can a network learn to abstain when it does not know?"),
        "abstention calibrate": Command("eval.abstention.command:calibrate",
                                        "calibrate a model's threshold for abstaining"),
        "claims": Command("eval.claims.command:main", "check published claims about a chat model"),
        "compare": Command("eval.comparison.command:main",
                           "train networks at equal budget and test the difference"),
        "eval": Command("eval.harness.command:main", "run benchmark tasks of lm_eval"),
    },
    "machine": {
        "doctor": Command("commands.doctor:main", "report devices, versions and problems found here"),
        "launch-check": Command("commands.launch_check:main",
                                "compile a run for a TPU slice without using one"),
    },
}
# Commands that give freed memory back: those that stream data larger than memory, and servers.
SMALL_MEMORY = ("data", "convert", "recall app", "serve")
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}


@command
def main(argv: Sequence[str]) -> int:
    """Runs the command that `argv` names.

    Raises:
        InputError: there is no such command.
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
    """Runs a command; tries the longest name first, `recall predict` before `recall`.

    Args:
        in_clone: whether convert and eval are top-level packages, as in a clone.
    """
    for words in (2, 1):
        if entry := COMMANDS.get(" ".join(argv[:words])):
            module, _, function = entry.main.partition(":")
            if not in_clone or module.partition(".")[0] not in ("convert", "eval"):
                module = f"tilelli_jax.{module}"
            program_cache.enable()
            if " ".join(argv[:words]) not in SMALL_MEMORY:
                allocator.keep_freed_memory()
            with interrupts.starting():
                function = getattr(importlib.import_module(module), function)
            return int(function(argv[words:]) or 0)
    near = difflib.get_close_matches(argv[0], [name for name in COMMANDS if " " not in name], 1)
    raise InputError(f"{argv[0]}: unknown command" + (f", did you mean {near[0]}?" if near else "")
                     + " (tilelli --help lists them)")


def run_in_clone(name: str, package: str | None) -> int:
    """Runs a command for `python -m eval.recall` and the like, which work in a clone without installation.

    Args:
        package: the caller's `__package__`.
    """
    in_clone = not (package or "").startswith("tilelli_jax")
    return command(lambda argv: run([*name.split(), *argv], in_clone))()


def overview() -> str:
    """Returns the overview: all commands, by group."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: tilelli COMMAND [options] [key=value …]", "",
             "Train small language models, and predict whether they answer correctly."]
    for group, commands in GROUPS.items():
        lines += ["", group, *(f"  {name:{width}}{entry.summary}" for name, entry in commands.items())]
    lines += ["", "tilelli COMMAND --help lists its options and every key of its configuration."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
