"""Fuzz targets that read model directories and checkpoints: generate, chat, splice, convert."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.convert.torch_files import LITE, file_config, save_pt, state_of, weights
from tests.fuzz.running import Target
from tests.gguf_files import write_gguf
from tests.reference_impl.random_weights import random_network
from tilelli_jax.commands import chat
from tilelli_jax.commands.generate import main as generate
from tilelli_jax.commands.splice import main as splice
from tilelli_jax.convert.command import main as convert
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.generation import abstain_rule
from tilelli_jax.generation.abstain_rule import AbstainRule
from tilelli_jax.io.tensors import INDEX, TENSORS, in_memory, write_directory
from tilelli_jax.loading import store
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.models.chronos import ChronosConfig
from tilelli_jax.models.gemma3 import Gemma3Config
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.llama import LlamaConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.t5 import T5Config
from tilelli_jax.models.vanilla import VanillaConfig

ABSTAINING = RoutedConfig(d_model=16, n_layers=1, max_seq_len=32, n_heads=2, d_head=8, top_k=4,
                          dense_expand=1, pathways=("local", "dense"), abstain_head=True)
PLAIN = VanillaConfig(d_model=16, n_layers=1, max_seq_len=32, n_heads=2, dense_expand=1)
GPT_NEOX = GPTNeoXConfig(vocab_size=20, d_model=8, n_layers=2, max_seq_len=32, n_heads=2, d_hidden=12)
GEMMA4 = Gemma4Config(
    vocab_size=20, d_model=12, layers=("sliding", "full"), max_seq_len=32, n_heads=2, n_kv_heads=1, d_head=6,
    n_kv_heads_full=1, d_head_full=12, window=5, n_shared_layers=0, d_hidden=10, d_per_layer=4,
    vocab_per_layer=20)
LLAMA = LlamaConfig(vocab_size=20, d_model=8, layers=("full",) * 2, max_seq_len=32, n_heads=2, n_kv_heads=1,
                    d_head=4, d_hidden=12)
GEMMA3 = Gemma3Config(vocab_size=20, d_model=8, layers=("sliding", "full"), max_seq_len=32, n_heads=2,
                      n_kv_heads=1, d_head=4, d_hidden=12, window=5)
T5 = T5Config(vocab_size=20, d_model=8, n_layers=1, n_decoder_layers=1, n_heads=2, d_head=4, d_hidden=12)
CHRONOS = dataclasses.replace(T5, chronos=ChronosConfig(n_tokens=20, context_length=20, prediction_length=6,
                                                        low_limit=-2.0))
COMPANIONS = {"tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": '{"chat_template": "{{ x }}"}',
              "generation_config.json": '{"eos_token_id": 1, "decoder_start_token_id": 0}'}
SOURCE = Path("source")
D, N = 6, 20  # width and latents of the autoencoders
CONFIGS: dict[str, dict[str, Any]] = {
    "saelens": {"architecture": "topk", "d_in": D, "d_sae": N, "k": 4, "apply_b_dec_to_input": True,
                "normalize_activations": "none",
                "metadata": {"model_name": "pythia", "hook_name": "blocks.3.hook_resid_post"}},
    "sparsify": {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "k": 4,
                 "num_latents": N, "transcode": False, "skip_connection": False, "d_in": D}}


def save(config: Any, path: Path) -> None:
    is_autoencoder = isinstance(config, SAEConfig)
    store.save(store.build(config) if is_autoencoder else random_network(config, 0)[0], path)


def save_sharded(config: Any, path: Path) -> None:
    """Writes a model directory of two tensor files and an index."""
    tensors = {name: in_memory(array) for name, array in random_network(config, 0)[1].items()}
    save(config, path)
    content = (path / store.CONFIG).read_bytes()
    shutil.rmtree(path)
    half = sum(tensor.nbytes for tensor in tensors.values()) // 2
    write_directory(path, tensors, {store.CONFIG: content}, writer="tilelli_jax", shard_bytes=half)


def save_abstain_rule(path: Path) -> None:
    abstain_rule.write(path, AbstainRule("abstain_p", 1, 0.5, "I do not know.", 0.1, 20, 0.05,
                                         (0.09, 0.02, 0.2), network_fingerprint(path)))


# --- generate, chat, splice ----------------------------------------------------------------------


def _make_models() -> None:
    save(ABSTAINING, Path("model"))
    save_abstain_rule(Path("model"))
    save_sharded(PLAIN, Path("plain"))
    Path("prompts.txt").write_text("What?\nWho is it?\n")
    Path("prompts.jsonl").write_text('{"prompt": "What?"}\n{"prompt": "Who is it?", "n": [1]}\n')


# --- convert ------------------------------------------------------------------------------------


def _make_pt() -> None:
    pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    state = state_of(weights(LITE))
    entries = {"config": file_config(LITE), "step": 3, "note": ["x", {"y": 1.5}]}
    save_pt(Path("source.pt"), {**entries, "model": state})
    renamed = {name.replace("embed", "table"): array for name, array in state.items()}
    save_pt(Path("renamed.pt"), {**entries, "model": renamed})
    Path("map.yaml").write_text("table.weight: embed.weight\nuntable.weight: unembed.weight\n"
                                "pos_table.weight: pos_embed.weight\n")


def _make_hugging_face(config: Any) -> None:
    random_network(config, 0)[0].save_pretrained(SOURCE)
    for name, text in COMPANIONS.items():
        (SOURCE / name).write_text(text)


def _make_gguf() -> None:
    _make_hugging_face(LLAMA)
    write_gguf(Path("model.gguf"), SOURCE)
    shutil.rmtree(SOURCE)


def _make_sharded() -> None:
    """A Hugging Face directory with the weights in two files and an index."""
    _make_hugging_face(GPT_NEOX)
    tensors = safetensors.numpy.load_file(SOURCE / TENSORS)
    (SOURCE / TENSORS).unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, shard_names in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in shard_names}, SOURCE / file)
    weight_map = {name: file for file, shard_names in parts.items() for name in shard_names}
    (SOURCE / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def _make_pickled() -> None:
    """A Hugging Face directory with the weights in a pickled file."""
    pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    _make_hugging_face(GPT_NEOX)
    file = SOURCE / TENSORS
    save_pt(file.with_name("pytorch_model.bin"), dict(safetensors.numpy.load_file(file)))
    file.unlink()


def _make_autoencoders() -> None:
    rng = np.random.default_rng(0)
    encoder, decoder = rng.standard_normal((D, N)), rng.standard_normal((N, D))
    saelens_arrays = {"W_enc": encoder, "b_enc": np.zeros(N), "W_dec": decoder, "b_dec": np.zeros(D)}
    names = {"saelens": ("sae_weights.safetensors", saelens_arrays), "sparsify": ("sae.safetensors", {
        "encoder.weight": encoder.T, "encoder.bias": np.zeros(N), "W_dec": decoder, "b_dec": np.zeros(D)})}
    for layout, (file, arrays) in names.items():
        Path(layout).mkdir()
        Path(layout, "cfg.json").write_text(json.dumps(CONFIGS[layout]))
        safetensors.numpy.save_file({name: np.ascontiguousarray(array, np.float32)
                                     for name, array in arrays.items()}, Path(layout, file))
    gemma = {"w_enc": encoder, "b_enc": np.zeros(N), "w_dec": decoder, "b_dec": np.zeros(D),
             "threshold": np.ones(N)}
    np.savez("params.npz", **gemma)
    Path("gemma").mkdir()
    Path("gemma", "config.json").write_text(json.dumps({
        "architecture": "jump_relu", "model_name": "gemma", "hf_hook_point_in": "model.layers.7.output"}))
    safetensors.numpy.save_file(gemma, Path("gemma", "params.safetensors"))


def _make_torch_autoencoders() -> None:
    pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    rng = np.random.default_rng(0)
    linear = {"encoder.weight": rng.standard_normal((N, D)).astype(np.float32),
              "decoder.weight": rng.standard_normal((D, N)).astype(np.float32)}
    Path("dictionary").mkdir()
    Path("dictionary", "config.json").write_text(json.dumps({
        "trainer": {"dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": N, "k": 4, "layer": 1,
                    "lm_name": "pythia", "submodule_name": "resid_post_layer_1"}, "buffer": {"ctx_len": 9}}))
    save_pt(Path("dictionary", "ae.pt"), {
        **linear, "encoder.bias": np.zeros(N, np.float32), "b_dec": np.zeros(D, np.float32),
        "threshold": np.array(1, np.float32), "k": np.array(4, np.int32)})
    save_pt(Path("openai.pt"), {
        **linear, "latent_bias": np.zeros(N, np.float32), "pre_bias": np.zeros(D, np.float32),
        "activation": "TopK", "activation_state_dict": {"k": 4, "postact_fn": "ReLU"}})


def _make_converted() -> None:
    """Model directories written by convert, to be converted back."""
    _make_pt()
    assert convert(["source.pt", "lite"]) == 0
    _make_hugging_face(CHRONOS)
    assert convert(["source", "chronos"]) == 0
    save(SAEConfig(d_model=D, n_latents=N, k=4), Path("sae"))
    shutil.rmtree(SOURCE)


ONE_BYTE = "--max-new 1 --temperature 0 --out out.jsonl"  # one byte per answer
GENERATE = (
    Target("generate", _make_models, generate, f"--model model --prompt x {ONE_BYTE}",
           "model model/config.json model/model.safetensors", 40),
    Target("generate, in files", _make_models, generate, f"--model plain --prompt x {ONE_BYTE}", "plain/*",
           40),
    Target("generate, prompts", _make_models, generate,
           f"--model plain --prompts-file prompts.txt {ONE_BYTE}", "prompts.txt", 20),
    Target("generate, JSON lines", _make_models, generate,
           f"--model plain --prompts-file prompts.jsonl {ONE_BYTE}", "prompts.jsonl", 30),
    Target("generate, abstention", _make_models, generate, f"--model model --prompt x --abstain {ONE_BYTE}",
           "model/abstain.json", 30),
    Target("chat", _make_models, chat.main, "--model model --abstain", "model/*", 30),
    Target("splice", _make_models, splice, "--head model --onto plain out", "model/* plain/*", 30))
ARGUMENTS, MUTATED = "source out", "source source/*"
CONVERT = (
    Target("convert, .pt", _make_pt, convert, "source.pt out", "source.pt", 45),
    Target("convert, map", _make_pt, convert, "renamed.pt out --map map.yaml", "map.yaml", 30),
    Target("convert, inspect", _make_pt, convert, "--inspect source.pt", "source.pt", 20),
    Target("convert, Pythia", _make_sharded, convert, ARGUMENTS, MUTATED, 60),
    Target("convert, pickled", _make_pickled, convert, ARGUMENTS, MUTATED, 40),
    Target("convert, Llama", partial(_make_hugging_face, LLAMA), convert, ARGUMENTS, MUTATED, 50),
    Target("convert, Gemma 3", partial(_make_hugging_face, GEMMA3), convert, ARGUMENTS, MUTATED, 50),
    Target("convert, GGUF", _make_gguf, convert, "model.gguf out", "model.gguf", 60),
    Target("convert, Gemma", partial(_make_hugging_face, GEMMA4), convert, ARGUMENTS, MUTATED, 50),
    Target("convert, Chronos", partial(_make_hugging_face, CHRONOS), convert, ARGUMENTS, MUTATED, 50),
    Target("convert, SAELens", _make_autoencoders, convert, "saelens out", "saelens saelens/*", 30),
    Target("convert, sparsify", _make_autoencoders, convert, "sparsify out", "sparsify sparsify/*", 30),
    Target("convert, Gemma Scope", _make_autoencoders, convert, "params.npz out", "params.npz", 20),
    Target("convert, Gemma Scope 2", _make_autoencoders, convert, "gemma out", "gemma gemma/*", 20),
    Target("convert, dictionary_learning", _make_torch_autoencoders, convert, "dictionary out",
           "dictionary dictionary/*", 30),
    Target("convert, openai", _make_torch_autoencoders, convert, "openai.pt out", "openai.pt", 20),
    Target("convert, to transformers", _make_models, convert, "plain out --to hf", "plain/*", 20),
    Target("convert, back to .pt", _make_converted, convert, "lite out.pt --to torch", "lite/*", 30),
    Target("convert, back", _make_converted, convert, "chronos out --to torch", "chronos/*", 40),
    Target("convert, to SAELens", _make_converted, convert, "sae out --to saelens", "sae sae/*", 20))
TARGETS = (*GENERATE, *CONVERT)
