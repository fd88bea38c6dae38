"""Results of a study's stages on disk, each in a directory that is named by what it was made of.

    ROOT/extract-3f09c2a41b7d/manifest.json     written last: the stage is whole; lists its files

What was made of the same things is taken as it is; with anything else in its place (other weights,
other data, another option) the key is another one, and so is the directory. Nothing is made anew that
need not be, and nothing old is lost. A stage that was interrupted finds what it has left.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tilelli_jax import interrupts
from tilelli_jax.errors import InputError
from tilelli_jax.files import as_json, checksums, find_damage, lock, write_atomically
from tilelli_jax.json_text import read_json

from . import tables

T = TypeVar("T")
FORMAT = 2  # to be raised where a stage's result for the same key would be another one
RECIPE = "manifest.json"
CHECKED_BYTES = 64 << 20  # of a larger file the size alone is looked at
RESULT = "result.json"  # of a stage that finds numbers
ANEW = "once you have deleted that directory, the same command makes it anew"
RESULTS = "results.json"  # of a whole study, beside its report


class BusyError(Exception):
    """Another process is making this stage."""


class Stages:
    """The stages of one study.

    Args:
        root: where their directories are.
        tell: called with a line for every stage that is made or found.
    """

    def __init__(self, root: Path, notify: Callable[[str], None] = lambda line: None) -> None:
        self.root, self.notify = root, notify
        self._whole: set[Path] = set()  # looked at before

    def open(self) -> None:
        """Makes the root, before anything is at stake. Raises InputError where it cannot be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out: {self.root.parent}: cannot be written: {error.strerror}") from None

    def directory(self, name: str, manifest: Mapping[str, Any]) -> Path:
        """Where a stage that is made of this has its files, whether it is made or not."""
        return self.root / f"{name}-{key(manifest)}"

    def is_made(self, name: str, manifest: Mapping[str, Any]) -> bool:
        """Whether it is there, and whole."""
        return (self.directory(name, manifest) / RECIPE).is_file()

    def make(self, name: str, manifest: Mapping[str, Any], work: Callable[[Path], None]) -> Path:
        """The directory of a stage, after `work` has filled it if it was not whole.

        Args:
            made_of: all that the result depends on: JSON.
            work: given the directory, in which it may find its own half-done work.

        Raises:
            BusyError: another process is at it.
            InputError: a file of the finished stage is not what was written, or there is something else in
                the place of its directory.
        """
        interrupts.raise_if_received()
        path = self.directory(name, manifest)
        if self.is_made(name, manifest):
            self._check(path)
            self.notify(f"{name}: as it is in {path}")
            return path
        if os.path.lexists(path / RECIPE):
            raise InputError(f"{path / RECIPE}: expected a regular file; {ANEW}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
        try:
            handle = lock(path, wait=False)
        except BlockingIOError:
            raise BusyError(f"{path}: another process is at work there") from None
        try:
            self.notify(f"{name}: {path}")
            if not self.is_made(name, manifest):  # another process may just have ended
                work(path)
                # Without what a process that was killed has left on its way to a file.
                files = (file for file in path.rglob("*") if file.is_file() and not any(
                    part.startswith(".") for part in file.relative_to(path).parts))
                write_atomically(path / RECIPE, as_json(
                    {**manifest, "files": checksums(path, files, CHECKED_BYTES)}))
        finally:
            if handle is not None:
                os.close(handle)
        return path

    def _check(self, path: Path) -> None:
        if path not in self._whole:
            try:
                sealed = read_json(path / RECIPE).get("files", {})
            except InputError as error:
                raise InputError(f"{error}; {ANEW}") from None
            if damaged := find_damage(path, sealed):
                raise InputError(f"{path}: {damaged}; {ANEW}")
            self._whole.add(path)


def recipe(stage: str, **parts: Any) -> dict[str, Any]:
    """What a stage is made of."""
    return {"stage": stage, "format": FORMAT, **parts}


def without(tree: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A section of a configuration less the keys that no result depends on."""
    return {name: value for name, value in tree.items() if name not in names}


def write_result(path: Path, tree: Any) -> None:
    """What a stage has found: JSON, numbers that are not finite as null."""
    write_atomically(path / RESULT, tables.as_json(tree))


def read_result(path: Path) -> dict[str, Any]:
    """What `write_result` wrote into a stage's directory. Raises InputError where it is no longer that."""
    return read_json(path / RESULT)


def key(manifest: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits for a tree of JSON."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]


def once(method: Callable[..., T]) -> Callable[..., T]:
    """A method of a study whose result is looked up once for given arguments, as a cached property's is."""
    @functools.wraps(method)
    def kept(self: Any, *arguments: Any) -> T:
        found = self.__dict__.setdefault("_once", {})
        if (what := (method.__name__, *arguments)) not in found:
            found[what] = method(self, *arguments)
        return found[what]
    return kept


def print_to_stderr(line: str) -> None:
    """What a command has its stages tell with."""
    print(line, file=sys.stderr, flush=True)
