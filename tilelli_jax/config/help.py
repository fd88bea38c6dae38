"""The `--help` of a configured command: every key with its type, default and meaning."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from tilelli_jax.cli.command import ArgumentParser
from tilelli_jax.config.schema import (
    DISCRIMINATOR,
    default_of,
    family_of,
    hints_of,
    mapping_of,
    sections_of,
    short_type_name,
)


def describe(cls: type) -> str:
    """Returns the help text: dotted name, type, default and meaning of every key of `cls`."""
    rows = list(describe_keys(cls, ""))
    width = max(len(key) for key, _, _ in rows)
    indent = " " * (width + 6)
    columns = max(shutil.get_terminal_size().columns - 2, len(indent) + 50)
    return "\n".join(f"  {key:<{width}}  {kind}\n" + textwrap.fill(
        meaning, columns, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False) for key, kind, meaning in rows)


def command_line(prog: str, doc: str | None, cls: type, shipped_as: str, example: str,
                 config_help: str = "") -> ArgumentParser:
    """Returns the parser of a command configured by `cls`: --config, `key=value`, and all keys in `--help`.

    A command adds its own options and uses `parse_intermixed_args`, so that overrides may come between
    options.

    Args:
        shipped_as: name of a shipped configuration, as an example for --config.
        example: an example override.
        config_help: help text of --config, in place of the one that names `shipped_as`.
    """
    parser = ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                            epilog=f"keys, with their defaults:\n{describe(cls)}")
    parser.add_argument("--config", required=True, metavar="FILE",
                        help=config_help or
                        f"YAML file of settings, or the name of a shipped one, e.g. {shipped_as}")
    # In a group of its own: argparse prints positional arguments before options.
    parser.add_argument_group("settings").add_argument(
        "overrides", nargs="*", metavar="key=value",
        help=f"settings that override the file's, e.g. {example}")
    parser.example = f"--config {shipped_as or 'FILE'}"
    return parser


def describe_keys(cls: Any, prefix: str, default: Any = None) -> Iterator[tuple[str, str, str]]:
    """Yields key, type with default, and meaning; defaults are as in `default`, if that is such a section."""
    for field in dataclasses.fields(cls):
        hint, name = hints_of(cls)[field.name], field.name
        if (in_mapping := mapping_of(hint)) is not None:
            hint, name = in_mapping, f"{name}.NAME"
            yield f"{prefix}{name}", "a section for each NAME", field.metadata["meaning"]
        sections = sections_of(hint)
        for section in sections:
            if len(sections) > 1:
                yield (f"{prefix}{name}", f"if {prefix}{name}.{DISCRIMINATOR}={family_of(section)}:",
                       str(section.__doc__).splitlines()[0])
            yield from describe_keys(section, f"{prefix}{name}.", default_of(cls, field.name, default))
        if not sections:
            text = "" if field.default is dataclasses.MISSING else (
                f" [{_format_default(default_of(cls, field.name, default))}]")
            kind = short_type_name(hint, field.metadata["bounds"]) + text
            yield f"{prefix}{field.name}", kind, field.metadata["meaning"]


def _format_default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, str) and (value != value.strip() or not value):  # spaces and line breaks need quotes
        return json.dumps(value, ensure_ascii=False)
    return "null" if value is None else str(value)
