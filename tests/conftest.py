"""Shared by all tests: devices, compiled programs, test order, failure reports, fixtures of a tiny run."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePath

from tests import compiled

# Must run before JAX is imported.
compiled.set_environment()

# Background processes of a shell ignore Ctrl-C, and so would their children; the tests need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import yaml  # noqa: E402
from jax.extend.backend import clear_backends  # noqa: E402

from tilelli_jax.cli import program_cache  # noqa: E402
from tilelli_jax.data.synthetic import stories  # noqa: E402

ROOT = Path(__file__).parents[1]
# Each file runs in one worker (--dist loadfile). The slowest files start first.
LONGEST = ("eval/abstention/test_abstention_study.py", "generation/test_decoding.py",
           "training/test_interrupted.py",
           "training/test_processes.py", "models/test_gemma4.py", "training/test_sharded_step.py",
           "train/test_train_command.py", "models/test_sharded_networks.py",
           "eval/recall/test_recall_study.py", "training/test_step.py", "generation/test_shipped_decoding.py",
           "eval/difficulty/test_study.py")
# a slow run on a busy machine is not a failure
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
REASON_LINES = 5  # lines per failure at the end of pytest's output

_devices = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="run only the K-th of N groups of test files")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # in the main process only
        program_cache.prune(program_cache.root("tests"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the tests: slow files first; within a file, tests on eight devices last, to switch once."""
    if part := config.getoption("--part"):
        k, n = _part(part)
        other_parts = [item for item in items if zlib.crc32(item.path.name.encode()) % n != k - 1]
        config.hook.pytest_deselected(items=other_parts)
        deselected = set(other_parts)
        items[:] = [item for item in items if item not in deselected]
    rank = {ROOT / "tests" / name: i for i, name in enumerate(LONGEST)}
    file_order = {path: i for i, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (rank.get(item.path, len(rank)), file_order[item.path],
                                 item.get_closest_marker("eight_devices") is not None))


def _part(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise pytest.UsageError(f"--part: expected K/N with K from 1 to N, found {text}")
    return int(k), int(n)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Sets the number of devices: one, or eight if the test is marked. A change invalidates all arrays."""
    global _devices
    n_devices = 8 if item.get_closest_marker("eight_devices") else 1
    if n_devices != _devices:
        jax.clear_caches()
        clear_backends()
        jax.config.update("jax_num_cpu_devices", n_devices)
        _devices = n_devices


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config
                            ) -> Iterator[None]:
    """Prints the seconds per directory with --durations, and at the very end the first failures."""
    result = yield
    if config.getoption("durations") is not None:
        seconds: Counter[str] = Counter()
        for report in chain.from_iterable(terminalreporter.stats.values()):
            if isinstance(report, pytest.TestReport):
                seconds[str(PurePath(report.location[0]).parent)] += report.duration
        terminalreporter.section("seconds by directory")
        for directory, total in seconds.most_common():
            terminalreporter.write_line(f"{total:7.1f}  {directory}")
    failed = [*terminalreporter.stats.get("failed", []), *terminalreporter.stats.get("error", [])]
    for report in failed[:3]:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr)
        lines = [line for line in text.splitlines() if line.strip()]
        terminalreporter.write_line(f"{report.nodeid} failed ({report.when}):", red=True)
        for line in lines[:REASON_LINES]:
            terminalreporter.write_line(f"  {line[:200]}")
    return result


@pytest.fixture(scope="module", autouse=True)
def _clear_compiled_programs() -> Iterator[None]:
    """Clears the compiled programs after each file; they would add up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """20 000 bytes of English."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(stories.generate(20_000))
    return path


@pytest.fixture(scope="session")
def tiny(text_file):
    """A run of 12 updates of a ternary network of 13 thousand parameters, as nested dicts."""
    return {
        "model": {"family": "routed", "d_model": 16, "n_layers": 2, "max_seq_len": 16, "n_heads": 2,
                  "d_head": 8, "top_k": 4, "dense_expand": 2, "quantizer": "ternary"},
        "data": {"source": str(text_file)},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 4},
        "train": {"steps": 12, "batch_size": 8, "seq_len": 16, "log_every": 1, "eval_every": 4,
                  "eval_batch_size": 8, "eval_bytes": 500, "checkpoint_every": 3},
    }


@pytest.fixture(scope="session")
def tiny_file(tiny, tmp_path_factory):
    """The configuration file of `tiny`."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


@pytest.fixture(scope="session")
def environment():
    """Environment variables for a separate process with one device."""
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def train_command():
    """The command line of `tilelli train`."""
    return [sys.executable, "-m", "tilelli_jax.train"]
