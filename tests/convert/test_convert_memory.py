"""The memory of a conversion is that of its largest tensor, not that of the whole, one tensor at a time."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.convert.torch_files import state_of
from tests.extras import needs_torch
from tilelli_jax.config import to_dict
from tilelli_jax.files import as_json
from tilelli_jax.models.arrays import outline
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig, RoutedLM
from tilelli_jax.pretrained import mapping
from tilelli_jax.tensors import Tensor, read_directory, write_directory

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
MARGIN = 60 * 10**6  # bytes beside a small network's conversion and the largest tensor; measured: 26 MB
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(),
                                reason="the peak of a process is read from Linux's /proc")

# VmHWM is of this program alone; ru_maxrss would begin with what the process that started it had. A small
# network is converted first: what Python, NumPy, JAX and maybe PyTorch hold is no part of the difference.
CHILD = """
import sys
from tilelli_jax.convert.command import main
for arguments in sys.argv[1:]:
    assert main(arguments.split("|")) == 0
    print("peak", next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A directory that is gone afterwards: pytest keeps those of three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def growth(environment: dict[str, str], *conversions: list[object]) -> list[int]:
    """Bytes by which the peak of a process of its own rose with each conversion but the first."""
    given = ["|".join(map(str, arguments)) for arguments in conversions]
    done = subprocess.run([sys.executable, "-c", CHILD, *given], env=environment, check=True,
                          capture_output=True, text=True)
    peaks = [1024 * int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    return np.diff(peaks).tolist()


def row(i: int, width: int) -> np.ndarray:
    """The i-th tensor's rows, which are all the same one."""
    return np.random.default_rng(i).standard_normal(width).astype(BF16)


def write_neox(path: Path, config: GPTNeoXConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `path` holds, as transformers has it."""
    family = FlaxGPTNeoXForCausalLM.hugging_face
    shapes = {name: leaf.shape for name, leaf in outline(FlaxGPTNeoXForCausalLM, config).items()}
    theirs = {link.theirs[0]: link.their_shape for link in mapping.link(family.names, shapes)}
    tensors = {name: Tensor(shape, BF16, lambda i=i, shape=shape: iter([
        np.broadcast_to(row(i, shape[-1]), shape)])) for i, (name, shape) in enumerate(theirs.items())}
    write_directory(path, tensors, {"config.json": as_json(family.tree_of(config))}, writer="pt")
    return theirs


def bound(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> float:
    """Of the growth."""
    sizes = [itemsize * math.prod(shape) for shape in shapes.values()]
    most = 1.3 * max(sizes) + MARGIN
    assert sum(sizes) > 2 * most  # or it would show nothing
    return most


@pytest.mark.exhaustive
def test_a_hugging_face_directory(large: Path, environment: dict[str, str]) -> None:
    small = GPTNeoXConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, d_hidden=32)
    config = GPTNeoXConfig(vocab_size=50, d_model=2048, n_layers=4, n_heads=32, d_hidden=4096)
    write_neox(large / "small", small)
    theirs = write_neox(large / "source", config)
    there, _, back = growth(environment, [large / "small", large / "0"], [large / "source", large / "out"],
                            [large / "0", large / "1", "--to", "torch"],
                            [large / "out", large / "back", "--to", "torch"])
    assert max(there, back) < bound(theirs, BF16.itemsize), (there, back)
    found = read_directory(large / "back")
    assert {name: tensor.shape for name, tensor in found.items()} == theirs
    for i, name in enumerate(theirs):
        mapped = found[name].mapped
        assert mapped is not None
        rows = mapped().reshape(-1, theirs[name][-1])[::50]
        assert (rows == row(i, theirs[name][-1])).all(), name


TALL: dict[str, Any] = {"vocab_size": 256, "positions": "none", "tie_embeddings": True,
                        "pathways": ("local", "sparse"), "n_heads": 1, "d_head": 8, "top_k": 3}
SAID = {"n_heads": 1, "top_k": 3, "quantize": False}
SIZES = {"small": RoutedConfig(**TALL, d_model=16, n_layers=2),
         "tall": RoutedConfig(**TALL, d_model=2048, n_layers=24)}


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our arrays; of the tall one 400 MB in float32, 16 of them a layer's values."""
    return {name: leaf.shape for name, leaf in outline(RoutedLM, SIZES[size]).items()}


@pytest.mark.exhaustive
@needs_torch
def test_a_torch_file(large: Path, environment: dict[str, str]) -> None:
    import torch
    for size in SIZES:
        shapes = shapes_of(size)
        state = state_of({name: np.broadcast_to(np.float32(i), shape)
                          for i, (name, shape) in enumerate(shapes.items())}, head="")
        torch.save({"config": SAID, "model": {name: torch.from_numpy(np.array(array))
                                              for name, array in state.items()}}, large / f"{size}.pt")
    grown, = growth(environment, [large / "small.pt", large / "0"], [large / "tall.pt", large / "out"])
    assert grown < bound(shapes, F32.itemsize), grown
    found = read_directory(large / "out")
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    for i, name in enumerate(shapes):
        mapped = found[name].mapped
        assert mapped is not None and (mapped().reshape(-1, shapes[name][-1])[::50] == i).all(), name


@pytest.mark.exhaustive
@needs_torch
def test_back_to_a_torch_file(large: Path, environment: dict[str, str]) -> None:
    import torch
    for size, config in SIZES.items():
        shapes = shapes_of(size)
        tensors = {name: Tensor(shape, F32, lambda i=i, shape=shape: iter([
            np.broadcast_to(np.float32(i), shape)])) for i, (name, shape) in enumerate(shapes.items())}
        write_directory(large / size, tensors, {"config.json": as_json(to_dict(config))},
                        writer="tilelli_jax")
    grown, = growth(environment, *([large / size, large / f"{size}.pt", "--to", "torch"] for size in SIZES))
    assert grown < bound(shapes, F32.itemsize), grown
    state = torch.load(large / "tall.pt", mmap=True)["state_dict"]
    assert len(state) == len(shapes)
    for i in range(SIZES["tall"].n_layers):
        values = state[f"blocks.{i}.sparse.Wv.weight"]
        assert values.shape == (2048, 2048)
        assert (values[::50] == list(shapes).index(f"blocks.{i}.sparse.value.kernel")).all()
