"""The data of Chronos: random numbers belong to the window, and no split leaks future values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.eval.difficulty import cheap, series
from tilelli_jax.eval.difficulty import chronos_data as module
from tilelli_jax.eval.difficulty.chronos_data import ChronosData
from tilelli_jax.eval.difficulty.config import CausalConfig, DifficultyConfig, ExtractConfig, SeriesConfig
from tilelli_jax.eval.difficulty.extract import Extraction, extract
from tilelli_jax.eval.inputs.networks import NetworkConfig
from tilelli_jax.loading import store
from tilelli_jax.models.chronos import Chronos, ChronosConfig, crps
from tilelli_jax.models.t5 import FlaxT5ForConditionalGeneration, T5Config
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.signals.time_series import encoder_activations

CONTEXT, HORIZON, STRIDE, TIME = 16, 4, 6, 150
STARTS = list(range(0, TIME - CONTEXT - HORIZON + 1, STRIDE))
VALUES = np.random.default_rng(3).standard_normal(TIME).cumsum()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chronos")
    config = T5Config(vocab_size=50, d_model=12, n_layers=3, n_decoder_layers=2, n_heads=3, d_head=5,
                      d_hidden=20, chronos=ChronosConfig(n_tokens=50, context_length=20, prediction_length=6,
                                                         num_samples=5, top_k=10))
    random_network(config, 0)[0].save_pretrained(path)
    (path / "series.csv").write_text("date,OT\n" + "".join(f"{i},{value!r}\n"
                                                           for i, value in enumerate(VALUES.tolist())))
    return path


def study(directory: Path, layers: tuple[int, ...] = (2, 0), hook: str = "encoder.resid_post",
          dtype: Any = "float32", **data: Any) -> DifficultyConfig:
    options = {"source": str(directory / "series.csv"), "context": CONTEXT, "horizon": HORIZON, "season": 4,
               "stride": STRIDE, "samples": 4, **data}
    return DifficultyConfig(network=NetworkConfig(path=str(directory)), data=SeriesConfig(**options), seed=5,
                       extract=ExtractConfig(hook=hook, layers=layers, batch_size=4, dtype=dtype),
                       causal=CausalConfig(samples=3, horizon=2))


@pytest.fixture(scope="module")
def study_data(directory: Path) -> ChronosData:
    return ChronosData(study(directory))


@pytest.fixture(scope="module")
def chronos(study_data: ChronosData, directory: Path) -> Chronos:
    return study_data.open(study_data.config.network, str(directory))


def test_windows_and_groups(study_data: ChronosData, directory: Path) -> None:
    assert len(study_data) == len(STARTS) and study_data.metadata["start"] == STARTS
    windows = study_data.windows
    for start, context, future in zip(STARTS, windows.contexts, windows.futures, strict=True):
        np.testing.assert_array_equal([*context, *future], VALUES[start:start + CONTEXT + HORIZON])
    assert study_data.groups.tolist() == [str(start // (CONTEXT + HORIZON)) for start in STARTS]
    # Windows of a group start within one span; groups that are two apart do not overlap.
    for i, a in enumerate(STARTS):
        for j, b in enumerate(STARTS):
            apart = abs(int(study_data.groups[i]) - int(study_data.groups[j]))
            assert apart > 0 or abs(a - b) < CONTEXT + HORIZON
            assert apart < 2 or abs(a - b) >= CONTEXT + HORIZON
    assert study_data.fingerprint == ChronosData(study(directory, stride=7)).fingerprint  # of the data
    assert study_data.fingerprint != ChronosData(study(directory, column="date")).fingerprint


def test_results_do_not_depend_on_the_other_items(study_data: ChronosData, chronos: Chronos) -> None:
    """The random numbers depend on the item number only."""
    together = study_data.measure(chronos, range(len(study_data)), (2, 0))
    assert set(together.numbers) == {"loss", "mase"} and (together.numbers["loss"] > 0).all()
    parts = [study_data.measure(chronos, items, (2, 0)) for items in (range(5), range(5, len(study_data)))]
    for name, values in together.numbers.items():
        np.testing.assert_array_equal(np.concatenate([part.numbers[name] for part in parts]), values)
    for layer in (0, 2):
        found = [values for part in parts for values in part.activations[layer]]
        assert len(found) == len(study_data) and found[0].shape == (CONTEXT + 1, 12)
        np.testing.assert_array_equal(found, together.activations[layer])
    chosen = [20, 3]
    subset = study_data.measure(chronos, chosen, ())
    np.testing.assert_array_equal(subset.numbers["loss"], together.numbers["loss"][chosen])
    assert subset.activations == {}


def test_measurements(study_data: ChronosData, chronos: Chronos) -> None:
    found = study_data.measure(chronos, range(3), (2, 0))
    contexts = np.array([VALUES[start:start + CONTEXT] for start in STARTS[:3]])
    futures = np.array([VALUES[start + CONTEXT:start + CONTEXT + HORIZON] for start in STARTS[:3]])
    samples = chronos.predict(contexts, HORIZON, num_samples=4, seed=5)
    np.testing.assert_allclose(found.numbers["loss"], crps(samples, futures).mean(axis=-1), rtol=1e-6)
    np.testing.assert_allclose(found.numbers["mase"], series.scores(samples, contexts, futures, 4)[1],
                               rtol=1e-6)
    for layer in (0, 2):
        for i, values in encoder_activations(chronos, contexts, layers=(layer,), batch_size=4):
            np.testing.assert_allclose(found.activations[layer][i], values[0], atol=1e-5)
    assert found.activations[0][0].dtype == np.float32


def test_the_next_shard_does_not_recompile(directory: Path, chronos: Chronos, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[tuple[int, ...]] = []
    encode = FlaxT5ForConditionalGeneration.encode_tapped

    def counting(self: Any, ids: Any, mask: Any, tap: Any) -> Any:
        traced.append((*ids.shape, len(tap.record)))
        return encode(self, ids, mask, tap)
    monkeypatch.setattr(FlaxT5ForConditionalGeneration, "encode_tapped", counting)
    study_data = ChronosData(study(directory, layers=(1,), context=18))  # a shape that no other test uses
    extract(tmp_path, study_data, chronos, range(len(study_data)), (1,), 5)
    assert len(list(tmp_path.glob("shard-*"))) == 5
    assert sorted(traced) == [(4, 19, 0), (4, 19, 1)]  # one for the forecasts, one for the activations
    assert Extraction(tmp_path).positions.tolist() == [19] * len(study_data)


def test_split_and_folds_go_forward(study_data: ChronosData, directory: Path) -> None:
    span = CONTEXT + HORIZON
    split = study_data.split({})
    cut = int(0.7 * TIME)
    assert split.tolist() == ["train" if start + span <= cut else "test" if start >= cut + span else "purge"
                              for start in STARTS]
    train = np.flatnonzero(split == "train")
    labels = np.arange(len(train)) % 2
    folds = study_data.folds(labels, train, 5)
    assert len(folds) >= 2
    for fit, held in folds:
        assert max(STARTS[i] for i in train[fit]) + span <= min(STARTS[i] for i in train[held])
    assert study_data.folds(labels[:2], train[:2], 5) == []  # too few for two folds
    # With fewer windows, the split covers only these.
    few = ChronosData(study(directory, items=20))
    assert len(few) == 20 and few.length == STARTS[19] + span
    assert set(few.split({}).tolist()) == {"train", "test", "purge"}


def test_blocks(study_data: ChronosData) -> None:
    found = study_data.blocks({}, study_data.split({}))
    assert list(found) == ["cheap"] and found["cheap"].names == cheap.SERIES_STATISTICS
    np.testing.assert_array_equal(found["cheap"].values,
                                  cheap.series_statistics(study_data.windows.contexts, 4))


def test_activation_rows(study_data: ChronosData, chronos: Chronos) -> None:
    """Every window occurs once, with all positions, in an order that depends on the seed."""
    items = [1, 4, 9, 10, 17]
    found = list(study_data.activation_rows(chronos, items, 2))
    expected = study_data.measure(chronos, items, (2,)).activations[2]
    order = np.random.default_rng(5).permutation(items).tolist()
    assert order != items
    for values, item in zip(found, order, strict=True):
        np.testing.assert_allclose(values, expected[items.index(item)], atol=1e-5)


def test_patched_losses_do_not_depend_on_the_other_items(study_data: ChronosData, chronos: Chronos) -> None:
    sae = TopKSAE(SAEConfig(d_model=12, n_latents=48, k=4), rngs=nnx.Rngs(1))
    losses = study_data.patched_losses(chronos, sae, range(8), [3], 1, "all")
    assert losses.shape == (8, 3) and (losses[:, 0] != losses[:, 1]).any()
    np.testing.assert_array_equal(study_data.patched_losses(chronos, sae, [6, 1], [3], 1, "all"),
                                  losses[[6, 1]])
    natural = chronos.predict(study_data.windows.contexts[:8], 2, num_samples=3, seed=5)
    np.testing.assert_allclose(losses[:, 0], crps(natural, study_data.windows.futures[:8, :2]).mean(axis=-1),
                               rtol=1e-6)
    boundary = study_data.patched_losses(chronos, sae, range(8), [], 1, "boundary")
    np.testing.assert_allclose(boundary[:, 0], losses[:, 0], rtol=1e-6)
    assert (boundary[:, 1] != losses[:, 1]).any()


def test_nonfinite_activations_are_reported(directory: Path, chronos: Chronos, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the item number, even in a later shard."""
    study_data = ChronosData(study(directory, dtype="float16"))
    huge = study_data.windows.contexts[13]

    def corrupted(chronos: Any, contexts: np.ndarray, **options: Any) -> Iterator[tuple[int, np.ndarray]]:
        for i, values in encoder_activations(chronos, contexts, **options):
            if (contexts[i] == huge).all():
                values[options["layers"].index(0), 3, 5] = 1e6  # exceeds float16
            yield i, values
    monkeypatch.setattr(module, "encoder_activations", corrupted)
    with pytest.raises(InputError) as caught:
        extract(tmp_path, study_data, chronos, range(len(study_data)), (2, 0), 10)
    assert_one_line(f"error: {caught.value}\n", "item 13, layer 0: activations are not finite as float16")
    assert [file.name for file in tmp_path.iterdir()] == ["shard-00000.safetensors"]
    with pytest.raises(InputError, match=r"^item 13, layer 0"):
        study_data.measure(chronos, [2, 13], (0,))
    with pytest.raises(InputError, match=r"^item 13, layer 0"):
        list(study_data.activation_rows(chronos, [2, 13, 14], 0))


def test_unsuitable_inputs_are_rejected(directory: Path, study_data: ChronosData, chronos: Chronos,
                                tmp_path: Path) -> None:
    for hook, layers, message in (("encoder.resid_pots", (0,), "extract.hook: expected one of encoder."),
                                ("decoder.resid_post", (0,), "extract.hook: expected one of encoder."),
                                ("encoder.resid_post", (3,), "extract.layers: expected 0 to 2, found 3")):
        with pytest.raises(InputError) as caught:
            ChronosData(study(directory, layers, hook)).measure(chronos, range(2), layers)
        assert_one_line(f"error: {caught.value}\n", message)
    with pytest.raises(InputError) as caught:
        ChronosData(study(directory, stride=40))
    assert_one_line(f"error: {caught.value}\n", "series.csv: expected at least 10 windows, found 4")
    with pytest.raises(InputError) as caught:
        ChronosData(study(directory, horizon=200))
    assert_one_line(f"error: {caught.value}\n", "series.csv: expected at least 216 values "
                    "(data.context + data.horizon), found 150")
    config = VanillaConfig(d_model=16, n_layers=1, max_seq_len=40, n_heads=2)
    store.save(random_network(config, 0)[0], tmp_path)
    with pytest.raises(InputError) as caught:
        study_data.open(NetworkConfig(path=str(tmp_path)), str(tmp_path))
    assert_one_line(f"error: {caught.value}\n", str(tmp_path), "expected a Chronos model, found family "
                                                               "vanilla")


def test_a_context_beyond_the_network_is_rejected(directory: Path) -> None:
    """Chronos would silently use only the last 20 values."""
    long = ChronosData(study(directory, context=21))
    with pytest.raises(InputError, match=r"data.context: expected at most 20, .* found 21"):
        long.open(long.config.network, str(directory))
