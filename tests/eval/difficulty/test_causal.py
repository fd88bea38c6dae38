"""Causal effects: a stored run of the published scripts, and planted latents with and without effect."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from tests.references import STORED, needs
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.eval.difficulty import causal, texts
from tilelli_jax.eval.difficulty.config import SquadConfig
from tilelli_jax.eval.difficulty.published.protocol import PROBES
from tilelli_jax.eval.inputs.rows import read_rows
from tilelli_jax.eval.stats import holm
from tilelli_jax.loading.store import build, from_arrays
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.signals.patching import PatchedText, patched_nll

TINY = STORED / "difficulty" / "tiny_world"
needs_reference = needs(TINY)


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    import pyarrow.parquet
    import safetensors.numpy
    state = torch.load(TINY / "sae/squad_allpos.pt", weights_only=True)
    names = {"encoder.kernel": "W_enc", "encoder.bias": "b_enc", "decoder.kernel": "W_dec", "bias": "b_dec"}
    sae = from_arrays(SAEConfig(d_model=32, n_latents=128, k=8, unit_norm="columns"),
                      {ours: state[theirs].numpy() for ours, theirs in names.items()})
    table = pyarrow.parquet.read_table(TINY / "allpos/squad_metadata.parquet").to_pydict()
    rows = safetensors.numpy.load_file(TINY / "allpos/squad_activations.safetensors")["encoder_embeddings"]
    tokenizer = tokenizers.Tokenizer.from_file(str(STORED / "data" / "neox_20B_tokenizer.json"))
    return {"sae": sae, "split": np.array(table["split"]), "hard": np.array(table["difficulty"]),
            "rows": rows, "questions": texts.squad(read_rows(TINY / "squad.json"), "squad.json"),
            "encode": lambda text: tokenizer.encode(text, add_special_tokens=False).ids}


@needs_reference
def test_the_chosen_latents_match_the_stored_run(world: dict[str, Any]) -> None:
    """As in the published scripts, the codes' maximum is over all positions, including padding."""
    train = world["split"] == "train"
    sae = world["sae"]
    codes = sae.dense(sae.encode(jnp.asarray(world["rows"][train], jnp.float32)))
    latents = causal.rank_latents(np.asarray(codes).max(axis=1), world["hard"][train], 5, options=PROBES)
    expected = json.loads((TINY / "res/squad_allpos/causal_ablation_all.json").read_text())["top_features"]
    assert latents == expected


@needs_reference
@pytest.mark.parametrize(("positions", "every"), [
    ("all", 30), pytest.param("all", 6, marks=pytest.mark.exhaustive),
    pytest.param("boundary", 6, marks=pytest.mark.exhaustive)])
def test_the_patched_losses_match_the_stored_run(positions: str, every: int, world: dict[str, Any]) -> None:
    import pyarrow.parquet
    stored = pyarrow.parquet.read_table(
        TINY / f"res/squad_allpos/causal_ablation_{positions}.parquet").to_pydict()
    latents = [int(name.removeprefix("m_ablate_")) for name in stored if name.startswith("m_ablate_")]
    chosen = np.array(stored["window_id"])[::every]
    patches = []
    for i in chosen:
        question = world["questions"][i]
        prompt = world["encode"](question.prompt)[-SquadConfig().max_tokens:]
        n = len(prompt)
        patches.append(PatchedText(ids=prompt + world["encode"](question.endings[0]), target=n,
                               start=0 if positions == "all" else n - 1, stop=n))
    model = FlaxGPTNeoXForCausalLM.from_pretrained(TINY / "tiny_cheap")
    losses = patched_nll(model, world["sae"], patches, latents, hook="resid_post", layer=1)
    columns = ["m_natural", "m_sae_recon", *(f"m_ablate_{latent}" for latent in latents)]
    expected = np.stack([np.array(stored[name])[::every] for name in columns], axis=1)
    np.testing.assert_allclose(losses[:, :2], expected[:, :2], atol=2e-5)
    changes, theirs = losses[:, 2:] - losses[:, 1:2], expected[:, 2:] - expected[:, 1:2]
    np.testing.assert_allclose(changes, theirs, atol=2e-5)


def test_a_planted_effect_is_significant_and_an_inert_latent_is_not() -> None:
    rng = np.random.default_rng(0)
    natural = rng.exponential(size=200)
    table = np.stack([natural, natural + 0.3 + 0.1 * rng.standard_normal(200)], axis=1)
    shifts = {3: 0.05, 5: 0.0, 8: 0.0, 9: 0.0}
    noise = {latent: 0.1 * rng.standard_normal(200) * (latent != 5) for latent in shifts}
    ablated = [table[:, 1] + shift + noise[latent] for latent, shift in shifts.items()]
    table = np.column_stack([table, *ablated])
    effects = causal.effects(table, [3, 5], {3: [8], 5: [9]})
    planted, inert = effects.chosen[3], effects.chosen[5]
    assert planted.p < 0.01 and planted.change.excludes_zero
    assert planted.change.point == pytest.approx(0.05, abs=0.02)
    assert inert.p == 1 and inert.items_changed == 0
    assert inert.never_active and not planted.never_active
    assert holm([effect.p for effect in effects.controls.values()]).min() > 0.05
    assert effects.controls_as_large(3) == 0 and effects.controls_as_large(5) == 1
    assert effects.reconstruction.point == pytest.approx(0.3, abs=0.03)


def test_latents_of_weight_zero_are_not_ranked() -> None:
    rng = np.random.default_rng(0)
    codes = np.where(rng.random((60, 30)) < 0.2, rng.random((60, 30)), 0)
    labels = rng.integers(0, 2, 60)
    assert causal.rank_latents(codes, labels, 5, c_value=1e-4) == []
    planted = (codes[:, 7] > 0).astype(int)
    assert causal.rank_latents(scipy.sparse.csr_array(codes), planted, 3, c_value=0.1)[0] == 7


def test_controls_have_a_similar_activation_frequency() -> None:
    rng = np.random.default_rng(0)
    frequency = np.repeat([0.0, 0.02, 0.5, 0.9], 50)
    codes = (rng.random((400, 200)) < frequency).astype(float)
    drawn = causal.frequency_matched_controls(codes.sum(axis=0), [60, 120], 20)
    assert len({*drawn[60], *drawn[120]}) == 40 and not {60, 120} & {*drawn[60], *drawn[120]}
    assert {int(frequency[latent] * 100) for latent in drawn[60]} == {2}
    assert {int(frequency[latent] * 100) for latent in drawn[120]} == {50}
    assert causal.frequency_matched_controls(codes.sum(axis=0), [], 3) == {}
    few = causal.frequency_matched_controls([3, 0, 2, 1], [0], 5)
    assert sorted(few[0]) == [2, 3], "only latents that are active at least once"


def test_invalid_tables_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"table: expected \[items, 3\]"):
        causal.effects(np.ones((4, 2)), [1])
    with pytest.raises(ValueError, match="item 2 has no finite loss"):
        causal.effects(np.array([[1, 1, 1], [1, 1, 1], [1, np.nan, 1.0]]), [1])


def test_planted_in_a_network() -> None:
    """A latent along the right token's unembedding has an effect; one that the final norm removes has none.

    LayerNorm subtracts the mean of every position, so that writes along (1, …, 1) have no effect.
    """
    d, right = 16, 7
    model = build(GPTNeoXConfig(vocab_size=31, d_model=d, n_layers=2, n_heads=2, d_hidden=32), 0)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((8, d))
    directions[0] = np.asarray(model.unembed.kernel[...])[:, right]
    directions[1] = 1.0  # removed by the norm
    directions[2:] -= directions[2:].mean(axis=1, keepdims=True)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    sae = from_arrays(SAEConfig(d_model=d, n_latents=8, k=8, unit_norm="none"), {
        "encoder.kernel": 0.1 * directions.T.astype(np.float32), "bias": np.zeros(d, np.float32),
        "encoder.bias": np.full(8, 1.0, np.float32), "decoder.kernel": directions.astype(np.float32)})
    prompts = rng.integers(0, 31, (60, 6)).tolist()
    texts = [PatchedText([*prompt, right], target=6, start=5, stop=6) for prompt in prompts]
    table = patched_nll(model, sae, texts, list(range(8)), hook="resid_post", layer=1)
    effects = causal.effects(table, [0, 1], {0: [2, 3, 4], 1: [5, 6, 7]})
    planted, inert = effects.chosen[0], effects.chosen[1]
    assert planted.p < 0.01 and planted.change.low > 0.05 and planted.items_changed == 60
    assert effects.controls_as_large(0) == 0
    assert abs(inert.change.point) < 1e-5 and effects.controls_as_large(1) == 3
