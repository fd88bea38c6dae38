"""A conversion holds one tensor at a time: its peak memory grows with the largest tensor only."""

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
from tests.gguf_files import write_gguf
from tilelli_jax.config import to_dict
from tilelli_jax.io.files import as_json
from tilelli_jax.io.tensors import Tensor, read_directory, write_directory
from tilelli_jax.models.arrays import abstract_arrays
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.llama import FlaxLlamaForCausalLM, LlamaConfig
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.models.routed import RoutedConfig, RoutedLM
from tilelli_jax.pretrained import mapping

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
MARGIN = 60 * 10**6  # bytes allowed beyond 1.3 times the largest tensor; measured: 26 MB
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(),
                                reason="the peak of a process is read from Linux's /proc")

# VmHWM is the peak of this program alone; ru_maxrss would start at the memory of the parent process. A small
# network is converted first, so that the memory of Python, NumPy, JAX and PyTorch is not in the difference.
CHILD = """
import sys
from tilelli_jax.convert.command import main
for arguments in sys.argv[1:]:
    assert main(arguments.split("|")) == 0
    print("peak", next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A directory that is deleted after the test; pytest would keep those of three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def growth(environment: dict[str, str], *conversions: list[object]) -> list[int]:
    """Converts in one new process; returns the growth of its peak memory in bytes, from the second on."""
    commands = ["|".join(map(str, arguments)) for arguments in conversions]
    done = subprocess.run([sys.executable, "-c", CHILD, *commands], env=environment, check=True,
                          capture_output=True, text=True)
    peaks = [1024 * int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    return np.diff(peaks).tolist()


def tensor_row(i: int, width: int) -> np.ndarray:
    """The row that the i-th tensor repeats."""
    return np.random.default_rng(i).standard_normal(width).astype(BF16)


def write_source(path: Path, network: type[PretrainedModel], config: Any) -> dict[str, tuple[int, ...]]:
    """Writes a Hugging Face directory; returns the names and shapes of its tensors."""
    family = network.hugging_face
    shapes = {name: leaf.shape for name, leaf in abstract_arrays(network, config).items()}
    file_shapes = {link.theirs[0]: link.their_shape for link in mapping.link(family.names(config), shapes)}
    tensors = {name: Tensor(shape, BF16, lambda i=i, shape=shape: iter([
        np.broadcast_to(tensor_row(i, shape[-1]), shape)]))
               for i, (name, shape) in enumerate(file_shapes.items())}
    write_directory(path, tensors, {"config.json": as_json(family.tree_of(config))}, writer="pt")
    return file_shapes


def growth_limit(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> float:
    """Maximum allowed growth in bytes: the largest tensor plus a margin."""
    sizes = [itemsize * math.prod(shape) for shape in shapes.values()]
    limit = 1.3 * max(sizes) + MARGIN
    assert sum(sizes) > 2 * limit  # otherwise the test could not fail
    return limit


@pytest.mark.exhaustive
def test_hugging_face_directory(large: Path, environment: dict[str, str]) -> None:
    small = GPTNeoXConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, d_hidden=32)
    config = GPTNeoXConfig(vocab_size=50, d_model=2048, n_layers=4, n_heads=32, d_hidden=4096)
    write_source(large / "small", FlaxGPTNeoXForCausalLM, small)
    file_shapes = write_source(large / "source", FlaxGPTNeoXForCausalLM, config)
    grown_in, _, grown_back = growth(environment, [large / "small", large / "0"],
                                     [large / "source", large / "out"],
                                     [large / "0", large / "1", "--to", "torch"],
                                     [large / "out", large / "back", "--to", "torch"])
    assert max(grown_in, grown_back) < growth_limit(file_shapes, BF16.itemsize), (grown_in, grown_back)
    tensors = read_directory(large / "back")
    assert {name: tensor.shape for name, tensor in tensors.items()} == file_shapes
    for i, name in enumerate(file_shapes):
        mapped = tensors[name].mapped
        assert mapped is not None
        rows = mapped().reshape(-1, file_shapes[name][-1])[::50]
        assert (rows == tensor_row(i, file_shapes[name][-1])).all(), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", ["Q8_0", "F16"])
def test_gguf(format: str, large: Path, environment: dict[str, str]) -> None:
    """A file of blocks is decoded a part at a time: into float32, four times as large as the blocks."""
    sizes = {"small": LlamaConfig(vocab_size=64, d_model=32, layers=("full",), n_heads=1, n_kv_heads=1,
                                  d_head=32, d_hidden=64, max_seq_len=32),
             "large": LlamaConfig(vocab_size=64, d_model=2048, layers=("full",) * 3, n_heads=16,
                                  n_kv_heads=16, d_head=128, d_hidden=4096, max_seq_len=32)}
    for size, config in sizes.items():
        file_shapes = write_source(large / "source", FlaxLlamaForCausalLM, config)
        write_gguf(large / f"{size}.gguf", large / "source", format=format)
        shutil.rmtree(large / "source")
    grown, = growth(environment, [large / "small.gguf", large / "0"], [large / "large.gguf", large / "out"])
    assert grown < growth_limit(file_shapes, F32.itemsize), grown
    assert len(read_directory(large / "out")) == len(file_shapes)


TALL: dict[str, Any] = {"vocab_size": 256, "positions": "none", "tie_embeddings": True,
                        "pathways": ("local", "sparse"), "n_heads": 1, "d_head": 8, "top_k": 3}
FILE_CONFIG = {"n_heads": 1, "top_k": 3, "quantize": False}
CONFIGS = {"small": RoutedConfig(**TALL, d_model=16, n_layers=2),
           "tall": RoutedConfig(**TALL, d_model=2048, n_layers=24)}


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our arrays; "tall" has 400 MB in float32, 16 MB per layer in the value kernel."""
    return {name: leaf.shape for name, leaf in abstract_arrays(RoutedLM, CONFIGS[size]).items()}


@pytest.mark.exhaustive
@needs_torch
def test_torch_file(large: Path, environment: dict[str, str]) -> None:
    import torch
    for size in CONFIGS:
        shapes = shapes_of(size)
        state = state_of({name: np.broadcast_to(np.float32(i), shape)
                          for i, (name, shape) in enumerate(shapes.items())}, head="")
        torch.save({"config": FILE_CONFIG, "model": {name: torch.from_numpy(np.array(array))
                                                     for name, array in state.items()}}, large / f"{size}.pt")
    grown, = growth(environment, [large / "small.pt", large / "0"], [large / "tall.pt", large / "out"])
    assert grown < growth_limit(shapes, F32.itemsize), grown
    tensors = read_directory(large / "out")
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    for i, name in enumerate(shapes):
        mapped = tensors[name].mapped
        assert mapped is not None and (mapped().reshape(-1, shapes[name][-1])[::50] == i).all(), name


@pytest.mark.exhaustive
@needs_torch
def test_back_to_a_torch_file(large: Path, environment: dict[str, str]) -> None:
    import torch
    for size, config in CONFIGS.items():
        shapes = shapes_of(size)
        tensors = {name: Tensor(shape, F32, lambda i=i, shape=shape: iter([
            np.broadcast_to(np.float32(i), shape)])) for i, (name, shape) in enumerate(shapes.items())}
        write_directory(large / size, tensors, {"config.json": as_json(to_dict(config))},
                        writer="tilelli_jax")
    grown, = growth(environment, *([large / size, large / f"{size}.pt", "--to", "torch"] for size in CONFIGS))
    assert grown < growth_limit(shapes, F32.itemsize), grown
    state = torch.load(large / "tall.pt", mmap=True)["state_dict"]
    assert len(state) == len(shapes)
    for i in range(CONFIGS["tall"].n_layers):
        values = state[f"blocks.{i}.sparse.Wv.weight"]
        assert values.shape == (2048, 2048)
        assert (values[::50] == list(shapes).index(f"blocks.{i}.sparse.value.kernel")).all()
