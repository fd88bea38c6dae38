"""Packed networks: they compute what the network computes, on disk and in memory, in every command's way."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import tilelli_jax
from tests.reference_impl.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax import config as config_lib
from tilelli_jax import models
from tilelli_jax.errors import InputError
from tilelli_jax.io import packing
from tilelli_jax.io.tensors import TENSORS, in_memory, read_file, write_file
from tilelli_jax.loading import store
from tilelli_jax.models.abstain import attach_head, new_head
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.training.config import ExperimentConfig

ROOT = Path(__file__).parents[2]
QUANTIZERS: list[Any] = ["ternary", "ternary_row", "hadamard", "lsq", "power3", "power3_row"]
# Sizes that fill no group, one that is no power of two (its rotation is stored), and every part quantised.
ROUTED = RoutedConfig(d_model=12, n_layers=2, max_seq_len=64, n_heads=2, d_head=4, top_k=3, second_norm="mix",
                      pathways=("local", "wide", "state", "sparse", "dense"), quantizer="ternary",
                      quantize=("conv", "attention", "dense", "router", "embed", "unembed"))
VANILLA = VanillaConfig(d_model=16, n_layers=2, max_seq_len=64, n_heads=2, quantizer="ternary",
                        tie_embeddings=True, quantize=("attention", "dense", "embed"))
IDS = np.arange(40, dtype=np.int32)[None] * 6


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("config", [ROUTED, VANILLA], ids=["routed", "vanilla"])
def test_a_packed_directory_is_lossless(config: Any, quantizer: Any, tmp_path: Path) -> None:
    """The quantised kernels come back to the bit; saved again, the file is the same."""
    model = random_network(dataclasses.replace(config, quantizer=quantizer), 0)[0]
    tilelli_jax.save(model, tmp_path / "packed", packed=True)
    loaded = tilelli_jax.load(tmp_path / "packed")
    assert loaded.config == model.config and models.is_packed(loaded) and not models.is_packed(model)
    ours, theirs = models.weights(loaded), models.weights(model)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert np.asarray(ours[name].quantized()).tobytes() == np.asarray(weight.quantized()).tobytes(), name
        assert ours[name].is_packed == bool(weight.quantizer.levels) and ours[name].shape == weight.shape
        if weight.quantizer.levels:
            np.testing.assert_array_equal(ours[name].codes(), weight.codes())
    tilelli_jax.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "packed" / TENSORS).read_bytes()
    expected = np.asarray(model(IDS))
    np.testing.assert_allclose(loaded(IDS), expected, rtol=0, atol=noise(expected, steps=8))
    for temperature in (0.0, 1.0):
        data = [tilelli_jax.generate(network, "Once", max_new=30, temperature=temperature)[0].data
                for network in (loaded, model)]
        assert data[0] == data[1]


@pytest.mark.eight_devices
@pytest.mark.parametrize("quantizer", ["ternary_row", "power3"])
def test_codes_are_sharded_as_the_kernels(quantizer: Any, tmp_path: Path) -> None:
    model = random_network(dataclasses.replace(ROUTED, d_model=16, quantizer=quantizer), 0)[0]
    store.save(model, tmp_path, packed=True)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = store.load(tmp_path, mesh=mesh)
    up = sharded.blocks.dense.up.packed[...]
    assert up.dtype == np.int8 and up.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    with jax.set_mesh(mesh):
        logits = np.asarray(jax.jit(lambda model, ids: model(ids))(sharded, IDS))
    expected = np.asarray(model(IDS))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=noise(expected, steps=8))


def test_types_of_a_packed_network(tmp_path: Path) -> None:
    """Codes and scales keep theirs; the other weights have the one that is asked for."""
    store.save(random_network(ROUTED, 0)[0], tmp_path, packed=True)
    types: dict[str, set[str]] = {"packed": set(), "packed_scale": set(), "": set()}
    for name, array in to_arrays(store.load(tmp_path, param_dtype="bfloat16")).items():
        last = name.rpartition(".")[2]
        types[last if last in types else ""].add(array.dtype.name)
    assert types == {"packed": {"int8"}, "packed_scale": {"float32"}, "": {"bfloat16"}}


def test_an_abstain_head_on_a_packed_network(tmp_path: Path) -> None:
    store.save(random_network(ROUTED, 0)[0], tmp_path, packed=True)
    packed = store.load(tmp_path)
    headed = attach_head(packed, new_head(ROUTED.d_model))
    assert models.is_packed(headed)
    np.testing.assert_array_equal(headed(IDS), packed(IDS))


def test_sizes_of_the_shipped_configurations(tmp_path: Path) -> None:
    """At most 3.2 MB for Lite, 0.35 MB for atome, with everything in the directory."""
    for name, limit in (("tilelli-lite-ternary", 3.2e6), ("atome-944k", 0.35e6)):
        config = config_lib.load(ExperimentConfig, ROOT / "configs" / f"{name}.yaml").model
        store.save(store.build(config), tmp_path / name, packed=True)
        assert sum(file.stat().st_size for file in (tmp_path / name).iterdir()) <= limit, name


@pytest.mark.parametrize("config", [
    dataclasses.replace(ROUTED, quantizer="none"), dataclasses.replace(ROUTED, quantize=())])
def test_nothing_to_pack(config: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packed: expected quantised weights, found none: the network has"):
        tilelli_jax.save(store.build(config), tmp_path / "packed", packed=True)
    assert not (tmp_path / "packed").exists()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    store.save(random_network(ROUTED, 0)[0], path, packed=True)
    return path


NAME = "blocks.1.dense.up.packed"


@pytest.mark.parametrize(("change", "message"), [
    (lambda codes: codes[:-1], f"{NAME}: expected 116 bytes of 576 packed codes"),
    (lambda codes: codes.astype(np.float32), f"{NAME}: expected packed codes .U8., found float32"),
    (lambda codes: np.full_like(codes, 250), f"{NAME}: expected packed codes, found bytes that are none"),
    (lambda codes: None, f"missing: {NAME}"),
])
def test_damaged_codes_are_named(packed: Path, change: Any, message: str, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "damaged")
    arrays = {name: tensor.read() for name, tensor in read_file(packed / TENSORS).items()}
    assert len(arrays[NAME]) == packing.packed_size(12 * 48, "ternary") == 116
    arrays[NAME] = change(arrays[NAME])
    write_file(tmp_path / "damaged" / TENSORS,
               {name: in_memory(array) for name, array in arrays.items() if array is not None})
    with pytest.raises(InputError, match=message):
        store.load(tmp_path / "damaged")


def test_packed_codes_without_a_quantizer(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"ternary"', '"none"'))
    with pytest.raises(InputError, match=r"packed weights need a quantizer in config\.json, found none"):
        store.load(tmp_path / "other")
