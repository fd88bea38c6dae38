"""Prepares shards: `python -m tilelli_jax.data --source SRC … --out DIR`.

DIR gets train.bin, valid.bin and meta.json; `data.source=DIR` then trains on it. Of the village there is
more than text: `village-chat` and `village-calibration` are written to a file of JSON lines,
`village-prompts` to a directory with one such file for each regime.
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

from tilelli_jax.data import village
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.documents import open_sources
from tilelli_jax.data.shards import FILES, PARTIAL, write_shards
from tilelli_jax.data.village import files as village_files
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.tables import table

# Options of what is made of the village, and for which of it.
VILLAGE = {"pairs": ("village-chat", "village-calibration"), "each": ("village-prompts",),
           "unanswerable": ("village-chat",), "kinds": ("village-chat",),
           "seed": ("village-chat", "village-calibration", "village-prompts"),
           "people": ("village-chat", "village-calibration", "village-prompts"),
           "village_seed": ("village-chat", "village-calibration", "village-prompts")}
MADE = VILLAGE["seed"]


@command
def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    if not str(arguments.out).strip() or not all(arguments.source):
        raise InputError("--out, --source: expected a name, found an empty one")
    out = Path(arguments.out)
    _check_village(arguments)
    if arguments.source[0] in MADE:
        _write_village(arguments.source[0], out, arguments)
        return
    if not arguments.force and any((out / name).exists() for name in FILES):
        raise InputError(f"{out}: holds shards already; --force replaces them")
    if out.is_dir() and not any((out / name).exists() for name in FILES) and any(
            not path.name.startswith(PARTIAL) for path in out.iterdir()):  # which a killed process left
        raise InputError(f"{out}: holds other files and no shards; choose an empty or new directory")
    if arguments.max_bytes is not None and arguments.max_bytes < 1:
        raise InputError(f"--max-bytes: expected at least 1, found {arguments.max_bytes}")
    config = DataConfig(valid_fraction=arguments.valid_fraction)
    size = arguments.max_bytes or config.stories_bytes
    try:
        separator = arguments.separator.replace("\\n", "\n").replace("\\t", "\t").encode()
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
        raise InputError(f"--separator: expected UTF-8, found {arguments.separator!r}") from None
    sources = [source for name in arguments.source for source in open_sources(
        name, column=arguments.column, separator=separator,
        stories_bytes=(size, int(size * config.valid_fraction)))]
    with _tidy_on_sigterm():
        meta = write_shards(out, sources, valid_fraction=config.valid_fraction,
                            separator=separator, max_bytes=arguments.max_bytes)
    print(_table(out, meta))


def _check_village(arguments: argparse.Namespace) -> None:
    made = [source for source in arguments.source if source in MADE]
    if made and len(arguments.source) > 1:
        raise InputError(f"--source: {made[0]} goes with no other source, found {len(arguments.source)}")
    for name, sources in VILLAGE.items():
        if getattr(arguments, name) is not None and arguments.source[0] not in sources:
            raise InputError(f"--{name.replace('_', '-')}: is for --source {' or '.join(sources)}, "
                             f"found {arguments.source[0]}")
        if name.endswith("seed") and not 0 <= (getattr(arguments, name) or 0) < 2**32:
            raise InputError(f"--{name.replace('_', '-')}: expected 0 to {2**32 - 1}, "
                             f"found {getattr(arguments, name)}")


def _write_village(source: str, out: Path, arguments: argparse.Namespace) -> None:
    world = village.world(arguments.village_seed or 0,
                          village.DEFAULT if arguments.people is None else arguments.people)
    seed = arguments.seed or 0
    if source == "village-prompts":
        each = village.EACH if arguments.each is None else arguments.each
        made = village_files.of_regimes(village.prompts(world, each, seed))
        contents = {out / name: content for name, content in made.items()}
    elif source == "village-calibration":
        pairs = 200 if arguments.pairs is None else arguments.pairs
        contents = {out: village_files.of_calibration(village.calibration(world, pairs, seed))}
    else:
        pairs = 20_000 if arguments.pairs is None else arguments.pairs
        share = 0.5 if arguments.unanswerable is None else arguments.unanswerable
        contents = {out: village_files.of_chat(village.chat(
            world, pairs, seed, share, tuple(arguments.kinds or village.SEMANTIC)))}
    village_files.write(contents, arguments.force)
    print(table([("", "lines", "bytes"), *((str(path), f"{content.count(10):,}", f"{len(content):,}")
                                           for path, content in contents.items())], right=(1, 2)))


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
        "stories, facts or village (built in); village-chat, village-calibration, village-prompts"))
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="the directory that gets the shards; for village-chat and "
                        "village-calibration the file")
    parser.add_argument("--valid-fraction", type=float, default=defaults["valid_fraction"],
                        metavar="F", help="share of each source, at its end, that is kept for "
                        "validation [%(default)s]")
    parser.add_argument("--column", metavar="C", help="the field with the text, in .jsonl files "
                        "and data sets [text, or the only one that holds a string]")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="take at most so many bytes (a "
                        "validation part that a source has itself comes on top) [everything]")
    parser.add_argument("--separator", default="\\n\\n", metavar="STR", help="put between two "
                        r"files or records; \n and \t are understood [%(default)s]")
    parser.add_argument("--force", action="store_true", help="replace the shards in DIR, or the files")
    made = parser.add_argument_group("what is made of the village")
    made.add_argument("--pairs", type=int, metavar="N",
                      help="of chat, with repetition [20000]; for calibration, all different [200]")
    made.add_argument("--seed", type=int, metavar="S", help="of what is asked about it [0]")
    made.add_argument("--people", type=int, metavar="P", help="data.village_people of the text that was "
                      f"read [{village.DEFAULT}]")
    made.add_argument("--village-seed", type=int, metavar="S", help="data.village_seed of that text [0]")
    made.add_argument("--unanswerable", type=float, metavar="F", help="share of the pairs [0.5]")
    made.add_argument("--kinds", nargs="+", metavar="K", help="of those, some of "
                      f"{', '.join(village.KINDS)} [{' '.join(village.SEMANTIC)}]")
    made.add_argument("--each", type=int, metavar="N", help=f"prompts of a regime [{village.EACH}]")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
