"""Prepares shards: `python -m tilelli_jax.data --source SRC … --out DIR`.

DIR gets train.bin, valid.bin and meta.json; `data.source=DIR` then trains on it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.documents import open_sources
from tilelli_jax.data.shards import FILES, write_shards
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.tables import table


@command
def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    if not str(arguments.out).strip() or not all(arguments.source):
        raise InputError("--out, --source: expected a name, found an empty one")
    out = Path(arguments.out)
    if not arguments.force and any((out / name).exists() for name in FILES):
        raise InputError(f"{out}: holds shards already; --force replaces them")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in FILES):
        raise InputError(f"{out}: holds other files and no shards; choose an empty or new directory")
    if arguments.max_bytes is not None and arguments.max_bytes < 1:
        raise InputError(f"--max-bytes: expected at least 1, found {arguments.max_bytes}")
    config = DataConfig(valid_fraction=arguments.valid_fraction)
    size = arguments.max_bytes or config.stories_bytes
    separator = arguments.separator.replace("\\n", "\n").replace("\\t", "\t").encode()
    sources = [source for name in arguments.source for source in open_sources(
        name, column=arguments.column, separator=separator,
        stories_bytes=(size, int(size * config.valid_fraction)))]
    with _tidy_on_sigterm():
        meta = write_shards(out, sources, valid_fraction=config.valid_fraction,
                            separator=separator, max_bytes=arguments.max_bytes)
    print(_table(out, meta))


@contextlib.contextmanager
def _tidy_on_sigterm() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, as Ctrl-C does, so that temporary files are removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _table(out: Path, meta: dict[str, Any]) -> str:
    rows = [("", "bytes", "sha256")]
    rows += [(entry["source"], f"{entry['bytes']:,}", "") for entry in meta["sources"]]
    rows += [(str(out / f"{part}.bin"), f"{meta[part]['bytes']:,}", meta[part]["sha256"][:16])
             for part in ("train", "valid")]
    return table(rows, right=(1,))


def _parser() -> argparse.ArgumentParser:
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    parser = ArgumentParser(prog="python -m tilelli_jax.data", description=(
        "Makes byte shards (train.bin, valid.bin, meta.json) from text, reading it piece by "
        "piece, so that it may be larger than memory."))
    parser.add_argument("--source", required=True, nargs="+", metavar="SRC", help=(
        "text files, .jsonl files, globs of them, hf:NAME[#SUBSET][@REVISION][:COLUMN] (Hugging Face), "
        "stories or facts (both built in)"))
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="the directory that gets the shards")
    parser.add_argument("--valid-fraction", type=float, default=defaults["valid_fraction"],
                        metavar="F", help="share of each source, at its end, that is kept for "
                        "validation [%(default)s]")
    parser.add_argument("--column", metavar="C", help="the field with the text, in .jsonl files "
                        "and data sets [text, or the only one that holds a string]")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="take at most so many bytes (a "
                        "validation part that a source has itself comes on top) [everything]")
    parser.add_argument("--separator", default="\\n\\n", metavar="STR", help="put between two "
                        r"files or records; \n and \t are understood [%(default)s]")
    parser.add_argument("--force", action="store_true", help="replace the shards in DIR")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
