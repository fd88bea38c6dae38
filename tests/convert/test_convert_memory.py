"""The memory of a conversion is that of its largest tensor, not that of the whole: 2 GB, one at a time."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.convert.torch_files import state_of
from tilelli_jax.config import to_dict
from tilelli_jax.files import as_json
from tilelli_jax.models.arrays import outline
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig, RoutedLM
from tilelli_jax.pretrained import mapping
from tilelli_jax.tensors import Tensor, read_directory, write_directory

BF16 = np.dtype(ml_dtypes.bfloat16)
NEEDED = 8 * 10**9  # bytes of disk, the way back among them
BASE = 500 * 10**6  # of Python, NumPy and JAX; measured: 200 MB, and 370 MB with PyTorch
pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(),
                       reason="the peak of a process is read from /proc, which this system has not"),
    pytest.mark.skipif(shutil.disk_usage(tempfile.gettempdir()).free < NEEDED,
                       reason="writes networks of gigabytes, and there are not 8 GB of room")]

# VmHWM is of this program alone; ru_maxrss would begin with what the process that started it had.
CHILD = """
import sys
from convert.__main__ import main
assert main(sys.argv[1:]) == 0
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A directory that is gone afterwards: pytest keeps those of three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def peak(environment: dict[str, str], *arguments: object) -> int:
    """Bytes that a process of its own held at most while it converted."""
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments)], env=environment, check=True,
                          capture_output=True, text=True)
    return 1024 * int(done.stdout.split()[-1])


def row(i: int, width: int) -> np.ndarray:
    """The i-th tensor's rows, which are all the same one."""
    return np.random.default_rng(i).standard_normal(width).astype(BF16)


def test_a_hugging_face_directory(large: Path, environment: dict[str, str]) -> None:
    config = GPTNeoXConfig(vocab_size=50_000, d_model=4096, n_layers=2, n_heads=32, d_hidden=24_576)
    family = FlaxGPTNeoXForCausalLM.hugging_face
    shapes = {name: leaf.shape for name, leaf in outline(FlaxGPTNeoXForCausalLM, config).items()}
    theirs = {link.theirs[0]: link.their_shape for link in mapping.link(family.names, shapes)}
    tensors = {name: Tensor(shape, BF16, lambda i=i, shape=shape: iter([
        np.broadcast_to(row(i, shape[-1]), shape)])) for i, (name, shape) in enumerate(theirs.items())}
    write_directory(large / "source", tensors, {"config.json": as_json(family.tree_of(config))}, writer="pt")
    largest = max(tensor.nbytes for tensor in tensors.values())
    bound = 1.3 * largest + BASE
    assert sum(tensor.nbytes for tensor in tensors.values()) > 1.5 * bound  # or it would show nothing

    assert peak(environment, large / "source", large / "out") < bound
    shutil.rmtree(large / "source")
    assert peak(environment, large / "out", large / "back", "--to", "torch") < bound
    found = read_directory(large / "back")
    assert {name: tensor.shape for name, tensor in found.items()} == theirs
    for i, name in enumerate(theirs):
        mapped = found[name].mapped
        assert mapped is not None
        rows = mapped().reshape(-1, theirs[name][-1])[::50]
        assert (rows == row(i, theirs[name][-1])).all(), name


TALL = RoutedConfig(vocab_size=256, d_model=8192, n_layers=4, positions="none", tie_embeddings=True,
                    pathways=("local", "sparse"), n_heads=1, d_head=8, top_k=3)
SAID = {"n_heads": 1, "top_k": 3, "quantize": False}
LARGEST = 4 * TALL.d_model**2  # the values of a layer
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None,
                                 reason="PyTorch (extra: torch), which reads .pt files, is not installed")


def tall() -> dict[str, tuple[int, ...]]:
    """Names and shapes of our arrays, 1.1 GB in float32."""
    shapes = {name: leaf.shape for name, leaf in outline(RoutedLM, TALL).items()}
    assert max(map(math.prod, shapes.values())) * 4 == LARGEST
    assert sum(map(math.prod, shapes.values())) * 4 > 1.2 * (1.3 * LARGEST + BASE)
    return shapes


@needs_torch
def test_a_torch_file(large: Path, environment: dict[str, str]) -> None:
    import torch
    shapes = tall()
    state = state_of({name: np.broadcast_to(np.float32(i), shape)
                      for i, (name, shape) in enumerate(shapes.items())}, head="")
    torch.save({"config": SAID, "model": {name: torch.from_numpy(np.array(array))
                                          for name, array in state.items()}}, large / "source.pt")
    assert peak(environment, large / "source.pt", large / "out") < 1.3 * LARGEST + BASE
    found = read_directory(large / "out")
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    for i, name in enumerate(shapes):
        mapped = found[name].mapped
        assert mapped is not None and (mapped().reshape(-1, shapes[name][-1])[::50] == i).all(), name


@needs_torch
def test_back_to_a_torch_file(large: Path, environment: dict[str, str]) -> None:
    import torch
    shapes = tall()
    tensors = {name: Tensor(shape, np.dtype(np.float32), lambda i=i, shape=shape: iter([
        np.broadcast_to(np.float32(i), shape)])) for i, (name, shape) in enumerate(shapes.items())}
    write_directory(large / "model", tensors, {"config.json": as_json(to_dict(TALL))}, writer="tilelli_jax")
    assert peak(environment, large / "model", large / "back.pt", "--to", "torch") < 1.3 * LARGEST + BASE
    state = torch.load(large / "back.pt", mmap=True)["state_dict"]
    assert len(state) == len(shapes)
    for i in range(TALL.n_layers):
        values = state[f"blocks.{i}.sparse.Wv.weight"]
        assert values.shape == (8192, 8192)
        assert (values[::50] == list(shapes).index(f"blocks.{i}.sparse.value.kernel")).all()
