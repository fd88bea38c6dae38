"""Mutation testing: applies small faults one at a time to a copy of the tree, and runs their tests.

    python tools/mutations.py [--only 3,17] [--jobs 2] [--full] [--min-caught 38]

tools/mutations.yaml lists the faults. A fault is caught if pytest fails (exit status 1) on the fault's tests
of the default tier, or, with --full, on the whole tier. The exit status is 1 if fewer than --min-caught are
caught, and 2 if the list does not match the tree or its tests fail without a fault. The checkout is never
changed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml

from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tools" / "mutations.yaml"
MIN_CAUGHT = 38  # 95 % of the list: a fault may turn out to change nothing
PASSED, FAILED = 0, 1  # pytest's exit statuses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A fault: `old`, which occurs exactly once in `file`, becomes `new`; `tests` run first."""

    file: str
    old: str
    new: str
    kind: str
    tests: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """pytest's exit status, the first test that failed, and the run time in seconds."""

    status: int
    failed: str
    seconds: float

    @property
    def caught(self) -> bool:
        return self.status == FAILED

    def __str__(self) -> str:
        if self.caught:
            return f"caught by {self.failed or 'a test'}"
        if self.status == PASSED:
            return "not caught by the tests that ran"
        return f"not caught: pytest ended with {self.status}"


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    mutations = read(LIST)
    check(mutations, ROOT)
    chosen = options.only or list(range(1, len(mutations) + 1))
    if too_large := [number for number in chosen if not 1 <= number <= len(mutations)]:
        raise InputError(f"--only: expected numbers from 1 to {len(mutations)}, found {too_large[0]}")
    minimum = len(chosen) if options.only else MIN_CAUGHT
    if options.min_caught is not None:
        minimum = options.min_caught
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(options.jobs):
            copies.put(copy_tree(ROOT, Path(folder, str(job))))
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            listed_tests = sorted({test for number in chosen for test in mutations[number - 1].tests})
            # With --full run all tests: one that always fails would seem to catch every fault.
            shares = [[]] if options.full else [
                share for job in range(options.jobs) if (share := listed_tests[job::options.jobs])]
            unchanged = [pool.submit(_in_copy, copies, functools.partial(run, tests=share))
                         for share in shares]
            for future in unchanged:
                if (outcome := future.result()).status != PASSED:
                    raise InputError("tests: expected all to pass without a fault, found pytest exiting "
                                     f"with {outcome.status}{outcome.failed and ': ' + outcome.failed}")
            running = {pool.submit(_in_copy, copies, functools.partial(
                run_mutation, mutation=mutations[number - 1], full=options.full)): number
                       for number in chosen}
            caught = 0
            for future in concurrent.futures.as_completed(running):
                number, outcome = running[future], future.result()
                mutation = mutations[number - 1]
                caught += outcome.caught
                print(f"{number:3} {mutation.file}: {mutation.kind}: {outcome} ({outcome.seconds:.0f} s)",
                      flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught >= minimum else 1


def read(path: Path) -> list[Mutation]:
    """Reads the list. Raises InputError if it is unreadable, or an entry lacks a key or has another one."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of mutations")
    keys = {field.name for field in dataclasses.fields(Mutation)}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or entry.keys() != keys:
            raise InputError(f"{path}: entry {number}: expected the keys {', '.join(sorted(keys))}")
        if not isinstance(entry["tests"], list) or not entry["tests"]:
            raise InputError(f"{path}: entry {number}: tests: expected a list of files")
    return [Mutation(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def check(mutations: Iterable[Mutation], root: Path) -> None:
    """Raises InputError if `old` does not occur exactly once or equals `new`, or a file is missing."""
    for number, mutation in enumerate(mutations, 1):
        for path in (mutation.file, *mutation.tests):
            if not (root / path).is_file():
                raise InputError(f"entry {number}: {path}: no such file")
        count = (root / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        if count != 1:
            raise InputError(f"entry {number}: {mutation.file}: expected {mutation.old!r} once, "
                             f"found it {count} times")
        if mutation.old == mutation.new:
            raise InputError(f"entry {number}: {mutation.file}: expected new to differ from old")


def copy_tree(root: Path, folder: Path) -> Path:
    """Copies all files that git tracks or would track to `folder`, next to a link to ../shared."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                            check=True, capture_output=True).stdout.decode().split("\0")
    copy = folder / root.name
    for name in filter(None, listed):
        if (root / name).is_file():  # a tracked file may be deleted
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    if (root.parent / "shared").is_dir():
        (folder / "shared").symlink_to((root.parent / "shared").resolve())
    return copy


def run_mutation(copy: Path, mutation: Mutation, full: bool) -> Outcome:
    """Applies a fault, runs its tests, and reverts it."""
    path = copy / mutation.file
    before = path.read_bytes()
    try:
        path.write_bytes(before.replace(mutation.old.encode(), mutation.new.encode()))
        first = run(copy, mutation.tests, "-x")
        if first.status != PASSED or not full:
            return first
        all_tests = run(copy, [], "-x")
        return dataclasses.replace(all_tests, seconds=first.seconds + all_tests.seconds)
    finally:
        path.write_bytes(before)


def run(copy: Path, tests: Sequence[str], *options: str) -> Outcome:
    """Runs the default tests of some files, or of all files if none is named."""
    # No bytecode: if a file changes twice within a second, Python could load outdated bytecode.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=no", *options, *tests], cwd=copy,
        env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return Outcome(done.returncode, failed[1] if failed else "", time.monotonic() - start)


# ---------------------------------------------------------------------------------------------


def _in_copy(copies: queue.SimpleQueue[Path], work: Callable[[Path], Outcome]) -> Outcome:
    copy = copies.get()
    try:
        return work(copy)
    finally:
        copies.put(copy)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="tools/mutations.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", type=_numbers, metavar="N,M", help="numbers of faults in the list [all]")
    parser.add_argument("--jobs", type=_count, default=1, help="number of copies tested in parallel [1]")
    parser.add_argument("--full", action="store_true",
                        help="run the whole default tier if the fault's tests do not fail")
    parser.add_argument("--min-caught", type=int, metavar="N",
                        help=f"exit with 1 if fewer are caught [{MIN_CAUGHT}; with --only, all of them]")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected an integer ≥ 1, found {text!r}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return list(dict.fromkeys(_count(part) for part in text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
