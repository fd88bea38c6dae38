"""launch-check of a training step compiled for this machine's CPU, and for TPU slices if possible."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tilelli_jax.commands.launch_check import GIB, Report, _size, check, markdown_head, markdown_row, text
from tilelli_jax.errors import InputError
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.parallel.collectives import Collectives
from tilelli_jax.parallel.sharding import MeshConfig
from tilelli_jax.training.config import ExperimentConfig, TrainConfig
from tilelli_jax.training.flops import train_flops_per_token

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
