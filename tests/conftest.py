"""What all tests share: eight CPU devices, a store of compiled programs, and the smallest run there is."""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before JAX starts. Code generation is where tests of tiny networks spend their time: level 0
# takes a third of it, and leaves all that XLA itself does (partitioning, fusion) as it is. The older way
# to emit fused loops takes half of the rest, as long as there is one.
FLAGS: dict[str, Any] = {"--xla_force_host_platform_device_count": 8}
_given = os.environ.get("XLA_FLAGS", "")
if "optimization_level" not in _given:
    FLAGS["--xla_backend_optimization_level"] = 0
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"{flag}={value}" for flag, value in FLAGS.items() if flag not in _given)]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# No program is compiled twice in a session, neither by another worker nor by a process that a test
# starts: they inherit what is set here. JAX writes into its cache without a lock; who finds an entry
# that is not complete yet, or whose writer was killed, is to compile for himself, and not to talk of it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [
    os.environ.get("PYTHONWARNINGS"), "ignore:Error reading persistent compilation cache:UserWarning"]))

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402
import yaml  # noqa: E402

from tilelli_jax.data import stories  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What the tests of a file have compiled goes with them: it would add up to gigabytes."""
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
    """The environment of a process of its own with one device."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
                         "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def train_command():
    """`python -m tilelli_jax.train`."""
    return [sys.executable, "-m", "tilelli_jax.train"]
