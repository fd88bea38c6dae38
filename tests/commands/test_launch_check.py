"""launch-check of a training step compiled for this machine's CPU, and for TPU slices if possible."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from tilelli_jax import config as config_lib
from tilelli_jax.commands.launch_check import (
    GIB,
    InferenceConfig,
    Report,
    _size,
    check,
    markdown_head,
    markdown_row,
    text,
)
from tilelli_jax.errors import InputError
from tilelli_jax.loading import store
from tilelli_jax.models.llama import LlamaConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.parallel.collectives import Collectives
from tilelli_jax.parallel.sharding import MeshConfig
from tilelli_jax.training.config import ExperimentConfig, TrainConfig
from tilelli_jax.training.flops import inference_flops, train_flops_per_token

ROOT = Path(__file__).resolve().parents[2]
MODEL = RoutedConfig(d_model=16, n_layers=2, max_seq_len=16, pathways=("local", "dense"))
CONFIG = ExperimentConfig(model=MODEL, train=TrainConfig(batch_size=4, seq_len=16, steps=10))

SMALL = """
model: {family: routed, d_model: 64, n_layers: 2, max_seq_len: 32, n_heads: 2, d_head: 16, top_k: 4,
        quantizer: hadamard}
train: {batch_size: 16, seq_len: 32}
"""


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "small.yaml").write_text(SMALL)
    # JAX, once imported, passes libtpu's path to its child processes.
    environment = {key: value for key, value in os.environ.items() if key != "TPU_LIBRARY_PATH"}
    return subprocess.run([sys.executable, "-m", "tilelli_jax", "launch-check", *arguments, "--config",
                           str(tmp_path / "small.yaml")], capture_output=True, text=True, timeout=300,
                          env=environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "XLA_FLAGS": ""})


def check_on_one_cpu(config: ExperimentConfig) -> Report:
    report, = check(config, "small", "one CPU", jax.devices("cpu")[:1])
    return report


@pytest.fixture(scope="module")
def report() -> Report:
    return check_on_one_cpu(CONFIG)


def test_arguments_are_the_state_and_the_batch(report):
    d, layers = 16, 2
    block = 2 * d + 2 * d + 5 * d + 2 * d * 4 * d  # norm, router, convolution, dense
    parameters = 2 * 256 * d + 16 * d + 2 * d + layers * block
    moments = 2 * parameters
    batch = 4 * 17
    minimum = 4 * (parameters + moments) + batch
    assert minimum < report.arguments < minimum + 100  # plus step, key and the optimiser's counters
    assert report.aliased > 4 * (parameters + moments)  # donated
    assert report.total == (report.arguments + report.outputs - report.aliased + report.temporary
                            + report.program)
    assert report.collectives == []
    assert report.flops == pytest.approx(4 * 16 * train_flops_per_token(MODEL, 16))
    assert (report.peak_seconds, report.read_seconds, report.hbm) == (None, None, None)


def test_parts_of_a_batch_are_compiled_as_parts(report):
    train = dataclasses.replace(CONFIG.train, accumulate=4)
    parts = check_on_one_cpu(dataclasses.replace(CONFIG, train=train))
    assert parts.arguments == report.arguments
    assert parts.flops == report.flops


def test_a_mesh_that_does_not_fit():
    with pytest.raises(InputError, match=r"^small: mesh: data × fsdp × tensor"):
        check_on_one_cpu(dataclasses.replace(CONFIG, mesh=MeshConfig(data=3)))


REPORT = Report(
    name="lite", topology="v5e:2x4", devices=8, device_kind="TPU v5 lite",
    mesh={"data": 4, "fsdp": 2, "tensor": 1}, arguments=3 * 2**20, outputs=2 * 2**20, aliased=2**20,
    temporary=GIB, program=512, hbm=16 * GIB, collectives=[Collectives("all-reduce", 3, 4096)],
    flops=2e12, peak_seconds=0.00125, read_seconds=0.002, compile_seconds=5.0)


def test_text_and_table():
    shown = text(REPORT)
    for part in ("lite on v5e:2x4: 8 × TPU v5 lite", "data 4 · fsdp 2 · tensor 1", "1 GiB of 16 GiB",
                 "arguments 3 MiB", "temporary 1 GiB", "program 512 B", "all-reduce 3× 4 KiB", "2e+12",
                 "1.25 ms"):
        assert part in shown
    row = markdown_row(REPORT)
    assert row.count("|") == markdown_head().splitlines()[0].count("|")
    assert "| lite | v5e:2x4 | 4·2·1 | 3 MiB |" in row
    assert f"({(GIB + 4 * 2**20 + 512) / (16 * GIB):.1%})" in row


def test_without_the_compiler(tmp_path):
    # Hides an installed compiler.
    (tmp_path / "libtpu.py").write_text("raise ImportError('no module named libtpu')")
    result = run(tmp_path, "--topology", "v5e:2x4")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "'tilelli_jax[tpu]'" in result.stderr


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                    reason="the TPU compiler (extra: tpu) is not installed")


@needs_compiler
def test_a_slice_of_eight(tmp_path):
    result = run(tmp_path, "--topology", "v5e:2x4", "mesh.fsdp=4", "mesh.tensor=2")
    assert result.returncode == 0, result.stderr
    assert "8 × TPU v5 lite, mesh data 1 · fsdp 4 · tensor 2" in result.stdout
    assert "all-gather" in result.stdout
    assert "reduce-scatter" in result.stdout


@needs_compiler
@pytest.mark.parametrize(("arguments", "message"), [
    (["--topology", "v5x:2x4"], "--topology v5x:2x4: expected KIND:SHAPE"),
    (["--topology", "v5e:2x4", "mesh.data=3"], "does not make 8 devices"),
    (["--topology", "v5e:2x4", "train.batch_size=12"], "multiple of the 8 devices"),
])
def test_wrong_input(tmp_path, arguments, message):
    result = run(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("n_bytes", "shown"), [
    (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**20 - 1, "1024 KiB"),
    (150 * 2**20, "150 MiB"), (5 * 2**40, "5120 GiB")])
def test_sizes_are_readable(n_bytes, shown):
    assert _size(n_bytes) == shown


def inference(**changed: object) -> InferenceConfig:
    """A tiny Llama; 4 prompts of 8 tokens, caches of 16."""
    model = LlamaConfig(vocab_size=61, d_model=24, layers=("full", "full"), n_heads=4, n_kv_heads=2, d_head=6,
                        d_hidden=40, max_seq_len=32)
    return InferenceConfig(model, batch_size=4, prompt=8, context=16, **changed)


def test_inference_arguments_are_the_weights_the_ids_and_the_caches():
    prompts, decoding = check(inference(), "tiny", "one CPU", jax.devices("cpu")[:1])
    assert (prompts.name, decoding.name) == ("tiny: prompts", "tiny: decoding")
    block = 24 * 6 * (2 * 4 + 2 * 2) + 3 * 24 * 40 + 2 * 24
    weights = 2 * (61 * 24 + 2 * block + 24)  # bfloat16, tied
    caches = 2 * 2 * 2 * (4 * 2 * 16 * 6)  # layers, keys and values, bytes
    assert weights + 4 * 4 * 8 <= prompts.arguments < weights + 4 * 4 * 8 + 4 * 4 + 100
    assert caches <= prompts.outputs - 4 * 4 * 61 < caches + 100
    assert weights + caches <= decoding.arguments < weights + caches + 2 * 4 * 4 + 100
    assert decoding.aliased == caches, "the caches are updated in place"
    attention = 2 * 4 * 4 * 6  # layers; 4 operations for each channel of each head and visible key
    matrices = 2 * 2 * (block - 2 * 24)
    assert prompts.flops == 4 * (8 * matrices + 2 * 61 * 24 + attention * (8 * 9 / 2))
    assert decoding.flops == 4 * (matrices + 2 * 61 * 24 + attention * 16)


def test_inference_flops_count_the_keys_of_a_window():
    full, sliding = (inference_flops(dataclasses.replace(inference().model, layers=kinds, window=4), 1, 16)
                     for kinds in (("full", "full"), ("full", "sliding")))
    assert full - sliding == 4 * 4 * 6 * (16 - 4)


@pytest.mark.eight_devices
def test_inference_is_split_over_devices():
    one = check(inference(), "tiny", "one CPU", jax.devices("cpu")[:1])
    eight = check(inference(mesh=MeshConfig(data=4, tensor=2)), "tiny", "eight CPUs", jax.devices("cpu"))
    assert eight[1].arguments < one[1].arguments / 2
    assert [report.flops for report in eight] == [report.flops for report in one]
    assert any(c.kind == "all-reduce" for c in eight[1].collectives)


@pytest.mark.eight_devices
def test_inference_batches_that_do_not_fit():
    with pytest.raises(InputError, match=r"^tiny: batch_size: expected a multiple of the 8 devices"):
        check(inference(mesh=MeshConfig(data=8)), "tiny", "eight CPUs", jax.devices("cpu"))
    with pytest.raises(InputError, match=r"^context: expected at least the 8 tokens of a prompt, found 4"):
        dataclasses.replace(inference(), context=4)


@pytest.mark.parametrize("name", ["inference-llama-3.1-8b", "inference-qwen3-32b"])
def test_shipped_networks_have_the_published_sizes(name):
    config = config_lib.load(InferenceConfig, name)
    model = nnx.eval_shape(lambda: store.build(dataclasses.replace(config.model, layers=("full",) * 2)))
    sizes = {path: math.prod(leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    block = sum(size for path, size in sizes.items() if path[0] == "blocks") // 2
    total = sum(sizes.values()) + (len(config.model.layers) - 2) * block
    assert total == {"inference-llama-3.1-8b": 8_030_261_248, "inference-qwen3-32b": 32_762_123_264}[name]
