"""`tilelli convert --to hf`: transformers loads the directory and gives our logits, text and losses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.error_lines import assert_one_line
from tests.extras import needs_transformers
from tests.reference_impl.comparison import distance
from tests.reference_impl.random_weights import random_network
from tilelli_jax.convert.command import main
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.generation.decoding import generate_ids
from tilelli_jax.loading import store
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.hooks import Tap

VANILLA = VanillaConfig(d_model=24, n_layers=2, max_seq_len=48, n_heads=3, dense_expand=2)
ROUTED = RoutedConfig(d_model=16, n_layers=2, max_seq_len=48, n_heads=2, d_head=6, top_k=4,
                      pathways=("local", "wide", "state", "sparse", "dense"))
CASES: dict[str, Any] = {
    "vanilla": VANILLA,
    "vanilla: tied, no positions, ternary": dataclasses.replace(
        VANILLA, tie_embeddings=True, positions="none", quantizer="ternary",
        quantize=("attention", "dense", "embed")),
    "routed": ROUTED,
    "routed: two banks, sums, second norm": dataclasses.replace(
        ROUTED, n_banks=2, head_reduction="sum", second_norm="mix", conv_bias=True, router_bias=True),
    "routed: tied, no positions, norm of dense": dataclasses.replace(
        ROUTED, tie_embeddings=True, positions="none", second_norm="dense", pathways=("dense", "sparse")),
    "routed: hadamard": dataclasses.replace(ROUTED, d_model=12, quantizer="hadamard"),
    "routed: lsq, abstain head": dataclasses.replace(ROUTED, quantizer="lsq", abstain_head=True),
}
NAMES = [name if name in ("vanilla", "routed: two banks, sums, second norm") else
         pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES]
TEXTS = ["plain", "Ā, é, 日本語, 😀", "  runs   of\n\n\tspaces ", "<|endoftext|>", "\x00 and \x7f"]


@pytest.fixture
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(model, directory that `--to hf` wrote)."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = random_network(CASES[request.param], 0)[0]
    store.save(model, tmp_path / "ours")
    assert main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "hf"]) == 0
    return model, tmp_path / "theirs"


@needs_transformers
@pytest.mark.parametrize("written", NAMES, indirect=True)
def test_logits_and_greedy_text(written: Any) -> None:
    import torch
    import transformers
    model, path = written
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    ids = np.random.default_rng(1).integers(1, 256, (3, 17))
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
        mask = np.arange(17) >= np.array([0, 5, 11])[:, None]  # padding on the left
        positions = {"position_ids": torch.from_numpy(np.maximum(np.cumsum(mask, 1) - 1, 0))}
        padded = theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(int)),
                        **positions).logits.numpy()
        continued = theirs.generate(torch.from_numpy(ids[:1]), max_new_tokens=12, do_sample=False).numpy()
    ours = jax.jit(model)
    assert distance(np.asarray(ours(ids)), logits) < 1e-5
    assert distance(np.asarray(ours(ids, mask))[mask], padded[mask]) < 1e-5
    expected = generate_ids(model, [ids[0]], max_new=12, temperature=0, end_ids=(0,))[0].ids
    assert continued[0, 17:17 + len(expected)].tolist() == expected.tolist()


@needs_transformers
@pytest.mark.parametrize("written", ["routed: two banks, sums, second norm"], indirect=True)
def test_arguments_of_transformers(written: Any) -> None:
    """Hidden states, kept logits, tuples and losses are as in transformers' own networks."""
    import torch
    import transformers
    model, path = written
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    ids = np.random.default_rng(1).integers(1, 256, (2, 11))
    given = torch.from_numpy(ids)
    with torch.no_grad():
        full = theirs(given, output_hidden_states=True, labels=given)
        assert theirs(given).hidden_states is None and len(full.hidden_states) == ROUTED.n_layers + 1
        logits, recorded = model.tapped(ids, Tap(record=("embed", "resid_post", "hidden")))
        for state, expected in zip(full.hidden_states, (
                recorded["embed"], *recorded["resid_post"][:-1], recorded["hidden"]), strict=True):
            assert distance(np.asarray(expected), state.numpy()) < 1e-5
        assert distance(full.logits[:, -3:].numpy(), theirs(given, logits_to_keep=3).logits.numpy()) < 1e-5
        assert distance(full.logits.numpy(), theirs(given, return_dict=False)[0].numpy()) < 1e-5
        nll = float(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).sum())
        assert float(full.loss) == pytest.approx(nll / 20, rel=1e-5)
        summed = theirs(given, labels=given, num_items_in_batch=7).loss
        assert float(summed) == pytest.approx(nll / 7, rel=1e-5)
        for name, value in (("inputs_embeds", torch.zeros(2, 3, 16)), ("past_key_values", ()),
                            ("output_attentions", True), ("position_ids", given)):
            with pytest.raises(ValueError, match=f"^{name}: "):
                theirs(given, **{name: value})


@needs_transformers
@pytest.mark.parametrize("written", ["vanilla"], indirect=True)
def test_the_ids_of_a_text_are_its_bytes(written: Any) -> None:
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(written[1])
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode()), text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 256 and tokenizer.eos_token_id == 0


@pytest.mark.parametrize("written", ["routed: lsq, abstain head"], indirect=True)
def test_quantised_weights_are_frozen(written: Any) -> None:
    _, path = written
    names = {name.rpartition(".")[2] for name in store.read_tensors(path)}
    assert not names & {"alpha", "rotation"}
    assert not any("abstain" in name for name in store.read_tensors(path))
    tree = json.loads((path / "config.json").read_text())
    assert "quantizer" not in tree and tree["eos_token_id"] == 0


@pytest.mark.parametrize(("config", "message"), [
    (SAEConfig(d_model=6, n_latents=20, k=4), "expected a network that transformers has, found a sae"),
    (dataclasses.replace(VANILLA, vocab_size=300), "vocab_size: expected 256, the bytes, found 300")])
def test_other_networks(config: Any, message: str, tmp_path: Path,
                        capsys: pytest.CaptureFixture[str]) -> None:
    store.save(store.build(config), tmp_path / "ours")
    assert main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "hf"]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "theirs").exists()


def test_networks_of_transformers_are_written_as_by_torch(tmp_path: Path) -> None:
    config = GPTNeoXConfig(vocab_size=61, d_model=24, n_layers=1, n_heads=3, d_hidden=40)
    store.save(random_network(config, 0)[0], tmp_path / "ours")
    for to in ("hf", "torch"):
        assert main([str(tmp_path / "ours"), str(tmp_path / to), "--to", to]) == 0
    files = {to: {path.name: path.read_bytes() for path in (tmp_path / to).iterdir()}
             for to in ("hf", "torch")}
    assert files["hf"] == files["torch"] and "model.safetensors" in files["hf"]
