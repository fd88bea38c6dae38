"""Compares GPT-NeoX with stored references, and with transformers on random weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tests.extras import needs_transformers
from tests.reference_impl.comparison import assert_same_weights, distance
from tests.references import STORED, needs
from tests.tolerance import noise
from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import INDEX
from tilelli_jax.loading.store import from_arrays
from tilelli_jax.models.arrays import abstract_arrays
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.rotary_scaling import RotaryScaling
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.pretrained import hugging_face
from tilelli_jax.pretrained.gpt_neox import GPT_NEOX

REFERENCE = STORED / "pythia_tiny" / "parallel"
needs_reference = needs(REFERENCE)
NOISE = noise(1, steps=5)  # relative to the largest logit or activation; measured: 7e-7

TINY = GPTNeoXConfig(vocab_size=61, d_model=24, n_layers=2, max_seq_len=32, n_heads=3, d_hidden=40)
VARIANTS: dict[str, GPTNeoXConfig] = {
    "as Pythia": TINY,
    "in sequence": dataclasses.replace(TINY, parallel_residual=False, n_heads=2),
    "all channels rotated": dataclasses.replace(TINY, rotary_fraction=1.0, rotary_theta=500.0, n_layers=3),
    "half rotated, no attention bias": dataclasses.replace(TINY, rotary_fraction=0.5, attention_bias=False,
                                                           n_heads=4, norm_eps=1e-3),
    "linear scaling, tanh GELU": dataclasses.replace(
        TINY, rotary_scaling=RotaryScaling(kind="linear", factor=4.0), activation="gelu_tanh", n_heads=2),
}


def tapped(model: FlaxGPTNeoXForCausalLM, ids: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    run = jax.jit(lambda ids: model.tapped(ids, Tap(record=model.hooks)))
    logits, recorded = run(jnp.asarray(ids))
    return np.asarray(logits), {hook: np.asarray(value) for hook, value in recorded.items()}


@needs_reference
def test_matches_the_stored_reference() -> None:
    stored = np.load(REFERENCE / "ref_f32.npz")
    model = FlaxGPTNeoXForCausalLM.from_pretrained(REFERENCE)
    logits, recorded = tapped(model, stored["input_ids"])
    assert distance(logits, stored["logits"]) < NOISE
    for hook, name in (("resid_post", "layer_out"), ("mlp_write", "mlp_out"), ("attn_out", "attn_out")):
        assert distance(np.swapaxes(recorded[hook], 0, 1), stored[name]) < NOISE, hook
    assert distance(recorded["embed"], stored["hf_hidden_states"][:, 0]) == 0
    right = jax.jit(model)(stored["input_ids_right"])
    for ours, theirs, length in zip(right, stored["logits_right"], stored["lens"], strict=True):
        assert distance(ours[:length], theirs[:length]) < NOISE


@needs_reference
def test_greedy_tokens_match_the_reference() -> None:
    """Decodes with caches."""
    stored = np.load(REFERENCE / "ref_f32.npz")
    model = FlaxGPTNeoXForCausalLM.from_pretrained(REFERENCE)
    prompt, out = stored["gen_prompt"], stored["gen_out"]
    n = prompt.shape[1]
    prefill = jax.jit(lambda ids, lengths: model.prefill(ids, lengths, out.shape[1]))
    step = jax.jit(model.step)
    logits, caches = prefill(jnp.asarray(prompt), jnp.array([n]))
    result = [int(jnp.argmax(logits))]
    for at in range(n, out.shape[1] - 1):
        logits, caches = step(jnp.array(result[-1:]), caches, jnp.array([at]))
        result.append(int(jnp.argmax(logits)))
    assert result == out[0, n:].tolist()


def random_weights(config: GPTNeoXConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (1 + 0.3 * rng.standard_normal(leaf.shape) if name.endswith("scale") else
                   0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
            for name, leaf in shapes(config).items()}


@functools.cache
def shapes(config: GPTNeoXConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return abstract_arrays(FlaxGPTNeoXForCausalLM, config)


@needs_transformers
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_the_saved_directory_and_agrees(name: str, tmp_path: Path) -> None:
    import torch
    import transformers
    config = VARIANTS[name]
    model = from_arrays(config, random_weights(config))
    model.save_pretrained(tmp_path)
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 17))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True)
    logits, recorded = tapped(model, ids)
    assert distance(logits, expected.logits) < NOISE
    for i in range(config.n_layers):
        assert distance(recorded["resid_pre"][i], expected.hidden_states[i]) < NOISE

    # The directory written by transformers holds the same network, bit for bit.
    theirs.save_pretrained(tmp_path / "theirs")
    again = FlaxGPTNeoXForCausalLM.from_pretrained(tmp_path / "theirs")
    assert again.config == config
    assert_same_weights(again, model)


def test_a_round_trip_in_bfloat16(tmp_path: Path) -> None:
    rounded = {name: np.asarray(array.astype(jnp.bfloat16), np.float32)
               for name, array in random_weights(TINY).items()}
    model = from_arrays(TINY, rounded)
    model.save_pretrained(tmp_path, dtype="bfloat16")
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(jnp.bfloat16)}
    again = FlaxGPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, model)


def test_bfloat16_is_near_float32() -> None:
    arrays = random_weights(TINY)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 61, (4, 32)))
    exact, rough = (np.asarray(jax.jit(from_arrays(TINY, arrays, compute))(ids))
                    for compute in (ComputeConfig(), ComputeConfig(dtype="bfloat16")))
    assert 0 < np.abs(rough - exact).mean() / exact.std() < 0.02  # measured: 0.006


@pytest.mark.parametrize("name", ["in sequence", "half rotated, no attention bias", *(
    pytest.param(name, marks=pytest.mark.exhaustive) for name in ("as Pythia", "all channels rotated"))])
def test_cached_logits_match_the_forward_pass(name: str) -> None:
    config = VARIANTS[name]
    model = from_arrays(config, random_weights(config))
    ids = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (3, 14)))
    expected, lengths = np.asarray(jax.jit(model)(ids)), np.array([3, 9, 1])
    prefill, step = jax.jit(lambda ids, lengths: model.prefill(ids, lengths, 16)), jax.jit(model.step)
    logits, caches = prefill(ids[:, :9], jnp.asarray(lengths))
    for n_new in range(5):
        rows = np.arange(3)
        assert distance(logits, expected[rows, lengths + n_new - 1]) < NOISE
        logits, caches = step(ids[rows, lengths + n_new], caches, jnp.asarray(lengths + n_new))


@pytest.mark.parametrize(("config", "count"), [
    (GPTNeoXConfig(), 405_334_016),  # Pythia-410M
    (GPTNeoXConfig(d_model=2560, n_layers=32, n_heads=32, d_hidden=10240), 2_775_208_960)])  # Pythia-2.8B
def test_published_sizes(config: GPTNeoXConfig, count: int) -> None:
    model = nnx.eval_shape(lambda: FlaxGPTNeoXForCausalLM(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "saved"
    from_arrays(TINY, random_weights(TINY)).save_pretrained(path)
    return path


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


def rewritten(path: Path, **changes: Any) -> None:
    tree = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**tree, **changes}))


def retensored(path: Path, change: Any) -> None:
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, path / "model.safetensors")


def indexed(path: Path, index: str) -> None:
    (path / "model.safetensors").unlink()
    (path / INDEX).write_text(index)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda path: (path / "config.json").unlink(), "not a Hugging Face directory: config.json is missing"),
    (lambda path: (path / "config.json").write_text("["), "config.json: not JSON"),
    (lambda path: rewritten(path, model_type="llama"), "model_type: expected gpt_neox, found 'llama'"),
    (lambda path: rewritten(path, hidden_act="relu"),
     "config.json: hidden_act: expected gelu, gelu_new or gelu_fast, found 'relu'"),
    (lambda path: rewritten(path, rope_parameters={"rope_type": "yarn"}),
     "rope_type: expected default or linear, found 'yarn'"),
    (lambda path: rewritten(path, num_attention_heads=5),
     "config.json: d_model: expected a multiple of n_heads"),
    (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda path: (path / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors: cannot be read"),
    (lambda path: retensored(path, lambda arrays: arrays.pop("embed_out.weight")),
     "missing: embed_out.weight"),
    (lambda path: retensored(path, lambda arrays: arrays.update(extra=np.zeros(2))), "not known: extra"),
    (lambda path: rewritten(path, intermediate_size=41), "of another shape: "),
    (lambda path: indexed(path, '{"weight_map": {"a": "no.safetensors"}}'), "no.safetensors is missing"),
    (lambda path: indexed(path, "{}"), "expected file names under 'weight_map'"),
    (lambda path: (path / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "is a git-lfs pointer"),
    (lambda path: rewritten(path, rope_scaling={"type": "linear", "factor": 0}),
     "rope_scaling.factor: expected a number > 0, found 0"),
    (lambda path: rewritten(path, rope_scaling={"rope_type": "dynamic", "factor": 1.0}),
     "rope_scaling.rope_type: expected default or linear, found 'dynamic'"),
    (lambda path: (path / "generation_config.json").write_text("["),
     "generation_config.json: not JSON"),
    (lambda path: safetensors.numpy.save_file({}, path / "model.safetensors"),
     "config.json: expected tensors that fit this configuration, found none"),
    (lambda path: rewritten(path, rope_parameters=[1]), "rope_parameters: expected an object, found a list"),
    (lambda path: rewritten(path, quantization_config={"quant_method": "bitsandbytes"}),
     "config.json: quantization_config: expected weights that are not quantised, found quant_method 'bits"),
    (lambda path: rewritten(path, quantization_config=[]), "quantization_config: expected an object, found"),
    *((lambda path, ids=ids: rewritten(path, eos_token_id=ids),
       f"config.json: eos_token_id: expected {expected}")
      for ids, expected in (
          (10**9, "ids of the vocabulary, 0 to 60, found 1000000000"), ([3, 61], "ids of the"),
          (-1, "ids of the vocabulary, 0 to 60, found -1"), (True, "ids, found True"),
          ("3", "ids, found '3'"), (1.5, "ids, found 1.5"), ([None], "ids, found None"))),
    (lambda path: rewritten(path, bos_token_id=61), "bos_token_id: expected ids of the vocabulary, 0 to 60"),
    *((lambda path, ids=ids: (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids})),
       f"generation_config.json: eos_token_id: expected ids of the vocabulary, 0 to 60, found {result}")
      for ids, result in ((61, 61), ([1, -1], -1))),
])
def test_invalid_directories_raise(saved: Path, spoil: Any, message: str) -> None:
    spoil(saved)
    with pytest.raises(InputError) as caught:
        FlaxGPTNeoXForCausalLM.from_pretrained(saved)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@needs_transformers
@pytest.mark.parametrize("scaling", [{}, {"rope_type": "default"}, {"type": "linear", "factor": 1.0},
                                     {"rope_type": "default", "rope_theta": 900.0}])
@pytest.mark.parametrize("parameters", [{}, {"rope_type": "default", "rope_theta": 500.0},
                                        {"rope_type": "default", "partial_rotary_factor": 0.5}])
@pytest.mark.parametrize("older", [{}, {"rotary_pct": 0.75, "rotary_emb_base": 5000}])
def test_rotary_settings_are_read_as_in_transformers(
        older: Any, parameters: Any, scaling: Any, tmp_path: Path) -> None:
    import transformers
    tree = {**GPT_NEOX.tree_of(TINY), "rope_parameters": parameters, "rope_scaling": scaling, **older}
    tree = {key: value for key, value in tree.items() if value != {} and (older or "rotary" not in key)}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    ours = hugging_face.settings(GPT_NEOX, tree, {}, "config.json")
    assert (ours["rotary_theta"], ours["rotary_fraction"]) == (
        theirs["rope_theta"], theirs["partial_rotary_factor"])


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta: expected a number > 0, found 0"),
    ({"rope_parameters": {"partial_rotary_factor": 0}}, "rope_parameters.partial_rotary_factor: expected"),
    ({"rope_scaling": {"rope_theta": None}}, "rope_scaling.rope_theta: expected a number > 0, found null"),
    ({"rope_parameters": {}, "rotary_emb_base": 0}, "rotary_emb_base: expected a number > 0, found 0"),
    ({"rope_parameters": None, "rotary_pct": False}, "rotary_pct: expected a number > 0, found true")])
def test_invalid_rotary_settings_raise(saved: Path, changes: Any, message: str) -> None:
    """An invalid value, even zero, is not replaced by a default."""
    rewritten(saved, **changes)
    with pytest.raises(InputError) as caught:
        FlaxGPTNeoXForCausalLM.from_pretrained(saved)
    assert str(caught.value).startswith(f"{saved / 'config.json'}: {message}")


@pytest.mark.parametrize(("changes", "key"), [
    ({"rotary_pct": 0.5}, "rope_parameters.partial_rotary_factor is 0.25, but rotary_pct is 0.5"),
    ({"rotary_emb_base": 500}, "rope_parameters.rope_theta is 10000.0, but rotary_emb_base is 500")])
def test_contradicting_rotary_settings_are_read_as_in_transformers_with_a_warning(
        saved: Path, changes: Any, key: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = FlaxGPTNeoXForCausalLM.from_pretrained(saved).config
    assert not caplog.records
    rewritten(saved, **changes)
    assert FlaxGPTNeoXForCausalLM.from_pretrained(saved).config == expected
    assert f"{key}; using rope_parameters" in caplog.text


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"type": "linear", "factor": 1.0}, {}, None])
def test_neutral_position_scaling_is_accepted(saved: Path, scaling: Any) -> None:
    expected = FlaxGPTNeoXForCausalLM.from_pretrained(saved).config
    rewritten(saved, rope_scaling=scaling)
    assert FlaxGPTNeoXForCausalLM.from_pretrained(saved).config == expected


def test_end_ids_come_from_generation_config(saved: Path) -> None:
    """End ids of generation_config.json take precedence, as in transformers."""
    for ends, expected in (([0, 5, 7], (0, 5, 7)), (3, (3,)), (None, (0,))):
        rewritten(saved, eos_token_id=0)
        (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert FlaxGPTNeoXForCausalLM.from_pretrained(saved).config.end_ids == expected


def test_a_single_file_takes_precedence_over_an_index(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The single file is read, as in transformers, and a warning names both."""
    expected = FlaxGPTNeoXForCausalLM.from_pretrained(saved)
    (saved / INDEX).write_text('{"weight_map": {"a": "no.safetensors"}}')
    assert_same_weights(FlaxGPTNeoXForCausalLM.from_pretrained(saved), expected)
    assert f"has both model.safetensors and {INDEX}" in caplog.text


def test_invalid_masks_and_ids_raise(saved: Path) -> None:
    model = FlaxGPTNeoXForCausalLM.from_pretrained(saved)
    ids = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match="mask: expected contiguous unmasked ids in each row"):
        model(ids, jnp.array([[1, 1, 1, 1], [1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="mask: expected the shape of ids"):
        model(ids, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"ids: expected integers \[batch, time\], found .* \[0, 4\]"):
        model(ids[:0])
    with pytest.raises(InputError, match="param_dtype: expected float32 or bfloat16 or stored, found 'int8'"):
        FlaxGPTNeoXForCausalLM.from_pretrained(saved, param_dtype="int8")
    with pytest.raises(InputError, match="dtype: expected float32 or bfloat16, found 'int8'"):
        ComputeConfig(dtype="int8")


def test_sharded_files_and_old_names_load(saved: Path, tmp_path: Path) -> None:
    """Large and old checkpoints have shards, the causal mask, and another name of the head."""
    expected = FlaxGPTNeoXForCausalLM.from_pretrained(saved)
    arrays = safetensors.numpy.load_file(saved / "model.safetensors")
    arrays["lm_head.weight"] = arrays.pop("embed_out.weight")
    for name in list(arrays)[::3]:  # names in DDP and torch.compile
        arrays[f"module._orig_mod.{name}"] = arrays.pop(name)
    arrays["gpt_neox.layers.0.attention.bias"] = np.ones((1, 1, 4, 4), bool)
    arrays["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    shards = {f"part{i}.safetensors": dict(list(arrays.items())[i::2]) for i in range(2)}
    other = tmp_path / "other"
    other.mkdir()
    for name, part in shards.items():
        safetensors.numpy.save_file(part, other / name)
    index = {key: name for name, part in shards.items() for key in part}
    (other / INDEX).write_text(json.dumps({"weight_map": index}))
    shutil.copy(saved / "config.json", other)
    result = FlaxGPTNeoXForCausalLM.from_pretrained(other)
    assert_same_weights(result, expected)
