"""GGUF files, written as llama.cpp does, hold the networks of their Hugging Face directories."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilelli_jax
from tests.extras import needs_transformers
from tests.gguf_files import ROUNDED, permuted, write_directory, write_gguf
from tests.models.test_llama import GEMMA3, LINEAR, LLAMA, LLAMA3, MISTRAL, QWEN2, QWEN3, YARN
from tests.reference_impl.comparison import assert_same_weights
from tilelli_jax.__main__ import main
from tilelli_jax.convert.command import main as convert
from tilelli_jax.errors import InputError
from tilelli_jax.eval.recall.config import PromptConfig
from tilelli_jax.eval.recall.score import score
from tilelli_jax.io.tensors import read_directory
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.pretrained import gguf_file
from tilelli_jax.pretrained.gguf import read_gguf

pytest.importorskip("gguf", reason="gguf (extra: gguf) is not installed")
import gguf

SIX = (*("sliding",) * 5, "full")
PUBLISHED = replace(LLAMA3, original_max_len=8192)
CONFIGS: dict[str, Any] = {
    "llama": LLAMA,
    "llama: biases, untied": replace(LLAMA, attention_bias=True, mlp_bias=True, tie_embeddings=False),
    "llama: as many key heads, odd sizes": replace(
        LLAMA, d_model=15, n_heads=3, n_kv_heads=3, d_head=10, d_hidden=13, layers=("full",) * 3),
    "llama: llama3": replace(LLAMA, d_head=8, rotary_theta=500000.0, rotary_scaling=PUBLISHED),
    "llama: yarn": replace(LLAMA, rotary_scaling=YARN, norm_eps=1e-6),
    "llama: linear": replace(LLAMA, rotary_scaling=LINEAR, rotary_theta=1e6),
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen2: untied, yarn, one end": replace(QWEN2, tie_embeddings=False, rotary_scaling=YARN, end_ids=(3,)),
    "qwen3": replace(QWEN3, bos_id=None),
    "qwen3: untied": replace(QWEN3, tie_embeddings=False, n_kv_heads=1),
    "gemma3": replace(GEMMA3, query_scale=6, layers=("sliding",) * 2, rotary_theta=99.0),
    "gemma3: linear in full layers": replace(GEMMA3, query_scale=6, layers=SIX, n_kv_heads=1,
                                             rotary_scaling=LINEAR),
}
FIRST = ("llama: biases, untied", "mistral", "qwen2", "qwen3", "gemma3: linear in full layers")
BLOCKS = replace(LLAMA, d_model=256, d_hidden=256, n_heads=4, n_kv_heads=2, d_head=6)
# Where a block has its half-precision factors; all other bytes may have any value.
FACTORS = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
           "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.mark.parametrize("name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.exhaustive)
                                  for name in CONFIGS])
def test_files_hold_the_network_of_the_directory(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    source = write_directory(tmp_path / "directory", config)
    loaded = tilelli_jax.load(write_gguf(tmp_path / "network.gguf", source))
    assert loaded.config == config
    assert_same_weights(loaded, tilelli_jax.load(source))


def test_a_file_without_mistral_s_window_has_full_attention(tmp_path: Path) -> None:
    """llama.cpp's converter does not write it."""
    source = write_directory(tmp_path / "directory", MISTRAL)
    path = write_gguf(tmp_path / "network.gguf", source, metadata={"llama.attention.sliding_window": None})
    assert tilelli_jax.load(path).config == LLAMA


@pytest.mark.exhaustive
@needs_transformers
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_transformers_reads_the_same_network(name: str, tmp_path: Path) -> None:
    """Its tensors equal ours; the logits too, but for Gemma, of which it drops the scale of the queries."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here (extra: torch)")
    import transformers

    from tests.pretrained.test_gguf_tokenizer import byte_level
    metadata, _ = byte_level({"llama": "smollm", "gemma3": "qwen2"}.get(name, name))
    config = replace(CONFIGS[name], vocab_size=len(metadata["tokenizer.ggml.tokens"]), end_ids=(2,), bos_id=1)
    if name == "qwen3":  # transformers ignores the width of a head in the file
        config = replace(config, d_head=128)
    write_gguf(tmp_path / "a.gguf", write_directory(tmp_path / "directory", config), tokenizer=metadata)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    ours = tilelli_jax.load(tmp_path / "a.gguf")
    ours.save_pretrained(tmp_path / "back")
    state = theirs.state_dict()
    for key, tensor in read_directory(tmp_path / "back").items():
        np.testing.assert_allclose(state[key].numpy(), tensor.read(), rtol=0, atol=1e-6, err_msg=key)
    if name != "gemma3":
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
        with torch.no_grad():
            logits = theirs(torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_allclose(ours(ids), logits, rtol=0, atol=2e-5 * np.abs(logits).max())


def test_commands_and_scores_read_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    from tests.pretrained.test_gguf_tokenizer import byte_level
    metadata, _ = byte_level("smollm")
    config = replace(LLAMA, vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    source = write_directory(tmp_path / "directory", config)
    path = write_gguf(tmp_path / "a.gguf", source, tokenizer=metadata)
    out = tmp_path / "out"
    assert convert([str(path), str(out)]) == 0
    capsys.readouterr()
    printed = []
    for model in (path, out):
        assert main(["generate", "--model", str(model), "--prompt", "a b", "--max-new", "5"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""
    # Sampling settings of its author are not used unasked.
    (out / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.01, "top_k": 1}')
    assert main(["generate", "--model", str(out), "--prompt", "a b", "--max-new", "5"]) == 0
    assert capsys.readouterr().out == printed[0]
    prompt = PromptConfig(template="{question}\nA:")
    scores = [score("first_token_entropy", model, ["one", "two three"], prompt=prompt)
              for model in (path, out)]
    np.testing.assert_array_equal(*scores)
    assert np.isfinite(scores[0]).all() and scores[0][0] != scores[0][1]


def test_blocks_stay_in_bfloat16_for_a_network_computed_in_it(tmp_path: Path) -> None:
    """Half the memory, with the same logits as from float32."""
    source = write_directory(tmp_path / "directory", BLOCKS)
    path = write_gguf(tmp_path / "network.gguf", source, tensors={
        "token_embd.weight": (random_blocks("Q8_0", 61, 256), "Q8_0")})
    halved, stored = (tilelli_jax.load(path, ComputeConfig("bfloat16"), param_dtype=kind) for kind in (
        None, "stored"))
    types = [(str(model.embed.kernel.dtype), str(model.final_norm.scale.dtype)) for model in (halved, stored)]
    assert types == [("bfloat16", "float32"), ("float32", "float32")]
    ids = np.arange(12)[None]
    np.testing.assert_array_equal(halved(ids), stored(ids))


@pytest.mark.parametrize("format", ["F16", "BF16"])
def test_half_precision_is_exact(format: str, tmp_path: Path) -> None:
    source = write_directory(tmp_path / "directory", LLAMA, format)
    path = write_gguf(tmp_path / "network.gguf", source, format=format)
    assert_same_weights(tilelli_jax.load(path), tilelli_jax.load(source))
    file = read_gguf(path)
    assert (file.formats["model.embed_tokens.weight"], file.formats["model.norm.weight"]) == (format, "F32")
    table = file.tensors["model.embed_tokens.weight"]
    assert table.dtype == table.read().dtype == ROUNDED[format]


def random_blocks(format: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Random bytes with factors of usual sizes: `[rows, bytes of a row]`."""
    rng = np.random.default_rng(seed)
    n, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
    blocks = rng.integers(0, 256, (rows * width // n, size), dtype=np.uint8)
    for place in FACTORS[format]:
        factors = rng.standard_normal((len(blocks), 1)).astype(np.float16)
        blocks[:, place:place + 2] = factors.view(np.uint8)
    return blocks.reshape(rows, -1)


def transformers_decoder() -> Any:
    """A module of transformers, without the rest of that package, whose import takes seconds."""
    spec = importlib.util.find_spec("transformers")
    path = Path(spec.origin).parent / "integrations" / "gguf" / "dequant.py" if spec and spec.origin else None
    if path is None or not path.is_file():
        pytest.skip("transformers with a decoder of GGUF (extra: hf) is not installed")
    spec = importlib.util.spec_from_file_location("transformers_dequant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decoded(format: str, stored: np.ndarray) -> np.ndarray:
    """The numbers, by another decoder: transformers', or for Q5_0 and Q5_1 the definition."""
    if format not in ("Q5_0", "Q5_1"):
        torch = pytest.importorskip("torch", reason="PyTorch is not installed here (extra: torch)")
        kind = gguf.GGMLQuantizationType[format].value
        numbers = transformers_decoder().dequantize(torch.from_numpy(stored.reshape(-1)), kind)
        return numbers.numpy().reshape(len(stored), -1)
    n_factors = len(FACTORS[format])
    blocks = stored.reshape(-1, 2 * n_factors + 20)
    factors = blocks[:, :2 * n_factors].copy().view(np.float16).astype(np.float32)
    fifth = blocks[:, 2 * n_factors:][:, :4].copy().view("<u4")
    numbers = np.empty((len(blocks), 32), np.float32)
    for i in range(32):
        byte = blocks[:, 2 * n_factors + 4 + i % 16].astype(np.uint32)
        number = ((byte >> (4 if i >= 16 else 0)) & 15) | (((fifth[:, 0] >> i) & 1) << 4)
        numbers[:, i] = number.astype(np.float32) - (16 if format == "Q5_0" else 0)
    numbers = factors[:, :1] * numbers + (factors[:, 1:] if format == "Q5_1" else 0)
    return numbers.reshape(len(stored), -1)


@pytest.mark.parametrize("format", FACTORS)
def test_blocks_are_decoded_a_part_at_a_time(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                             ) -> None:
    """A table of several parts, rows that llama.cpp permutes, and others."""
    source = write_directory(tmp_path / "directory", BLOCKS)
    stored = {name: random_blocks(format, rows, 256, i) for i, (name, rows) in enumerate(
        {"token_embd": 61, "blk.0.attn_q": 24, "blk.1.attn_k": 12, "blk.1.ffn_down": 256}.items())}
    path = write_gguf(tmp_path / "network.gguf", source, tensors={
        f"{name}.weight": (blocks, format) for name, blocks in stored.items()})
    monkeypatch.setattr(gguf_file, "_BLOCK", 256 * 15)
    file = read_gguf(path)
    sizes = {"model.embed_tokens": [15] * 4 + [1], "model.layers.0.self_attn.q_proj": [12, 12],
             "model.layers.1.self_attn.k_proj": [12], "model.layers.1.mlp.down_proj": [15] * 17 + [1]}
    for (name, blocks), (theirs, parts) in zip(stored.items(), sizes.items(), strict=True):
        expected = decoded(format, blocks)
        if heads := {"blk.0.attn_q": 4, "blk.1.attn_k": 2}.get(name):
            in_order = np.empty_like(expected)
            in_order[permuted(np.arange(len(expected)), heads)] = expected
            expected = in_order
        tensor = file.tensors[f"{theirs}.weight"]
        assert [len(part) for part in tensor.parts()] == parts and tensor.shape == expected.shape
        assert tensor.read().dtype == np.float32 and file.formats[f"{theirs}.weight"] == format
        # a product of three numbers and a difference
        np.testing.assert_allclose(tensor.read(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_plain_tensors_are_read_a_part_at_a_time(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    path = write_gguf(tmp_path / "network.gguf", llama)
    whole = {name: tensor.read() for name, tensor in read_gguf(path).tensors.items()}
    monkeypatch.setattr(gguf_file, "_BLOCK", 24 * 7)
    for name, tensor in read_gguf(path).tensors.items():
        parts = list(tensor.parts())
        assert max(part.size for part in parts) <= 24 * 7 and (len(parts) > 1 or tensor.shape[0] <= 24)
        np.testing.assert_array_equal(np.concatenate(parts), whole[name])


def test_the_file_reader_of_gguf_agrees(llama: Path, tmp_path: Path) -> None:
    arrays = {"test.texts": ["a", "bc"], "test.numbers": [1, 2]}
    path = write_gguf(tmp_path / "a.gguf", llama, metadata=arrays)
    theirs, ours = gguf.GGUFReader(path), read_gguf(path)
    assert ours.metadata == {name: field.contents() for name, field in theirs.fields.items()
                             if not name.startswith("GGUF.")}
    assert len(ours.tensors) == len(theirs.tensors)


def config_of(path: Path, source: Path, **changes: Any) -> Any:
    return read_gguf(write_gguf(path / "a.gguf", source, **changes)).config


def test_settings_of_other_writers(llama: Path, tmp_path: Path) -> None:
    """Keys that a file may leave out, and those that llama.cpp reads besides its converter's."""
    scaling = "llama.rope.scaling."
    every_key_head = write_directory(tmp_path / "directory", replace(LLAMA, n_kv_heads=4))
    tree = config_of(tmp_path, every_key_head, metadata=dict.fromkeys((
        "llama.attention.head_count_kv", "llama.attention.key_length", "llama.attention.value_length",
        "llama.rope.dimension_count", "llama.rope.freq_base", "tokenizer.ggml.eot_token_id")) | {
            f"{scaling}factor": 2.5})
    assert (tree["num_key_value_heads"], tree["head_dim"], tree["eos_token_id"]) == (4, 6, [2])
    assert tree["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.5}
    harmless = {"llama.expert_count": 0, "llama.attention.causal": True, "llama.logit_scale": 1.0,
                "llama.vocab_size": 61, "llama.use_parallel_residual": False}
    assert config_of(tmp_path, llama, metadata=harmless) == config_of(tmp_path, llama)
    sentencepiece = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": None,
                     "tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.eot_token_id": None}
    tree = config_of(tmp_path, llama, metadata=sentencepiece)
    assert (tree["bos_token_id"], tree["eos_token_id"]) == (1, [2]), "llama.cpp's defaults"
    tree = config_of(tmp_path, llama, metadata={"llama.rope.scale_linear": 2.0})
    assert tree["rope_parameters"]["factor"] == 2.0
    tree = config_of(tmp_path, llama, metadata={f"{scaling}type": "none", f"{scaling}factor": 2.0})
    assert tree["rope_parameters"]["rope_type"] == "default"
    yarn = {f"{scaling}type": "yarn", f"{scaling}factor": 4.0}
    rope = config_of(tmp_path, llama, metadata=yarn)["rope_parameters"]
    assert rope["original_max_position_embeddings"] == 64 and "attention_factor" not in rope
    rope = config_of(tmp_path, llama, metadata=yarn | {f"{scaling}attn_factor": 2.0})["rope_parameters"]
    assert rope["attention_factor"] == pytest.approx(2 * (0.1 * np.log(4) + 1))


def test_layers_of_gemma(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "directory", replace(GEMMA3, query_scale=6, layers=SIX))
    config = tilelli_jax.load(write_gguf(tmp_path / "a.gguf", source, metadata={
        "gemma3.attention.sliding_window": None})).config
    assert config.layers == ("full",) * 6
    pattern = "gemma3.attention.sliding_window_pattern"
    for value, expected in ((2, ("sliding", "full") * 3), ([True, False, False, True, True, False], (
            "sliding", "full", "full", "sliding", "sliding", "full")), (6, SIX)):
        path = write_gguf(tmp_path / "a.gguf", source, metadata={pattern: value})
        assert tilelli_jax.load(path).config.layers == expected
    for value in ([True], 0, True, "x"):
        with pytest.raises(InputError, match=f"{pattern}: expected"):
            config_of(tmp_path, source, metadata={pattern: value})
    tree = config_of(tmp_path, source, metadata={"gemma3.block_count": 62, "gemma3.attention.head_count": 8})
    assert tree["query_pre_attn_scalar"] == 3  # the 27B divides by the width of the network's heads
    assert config_of(tmp_path, source)["query_pre_attn_scalar"] == 6


@needs_transformers
def test_convert(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file becomes the model directory that the Hugging Face directory becomes, and goes back."""
    path = write_gguf(tmp_path / "a.gguf", llama, format="F16")
    capsys.readouterr()
    assert convert(["--inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("model.layers.1.self_attn.k_proj.weight"))
    assert row.split()[1:3] == ["12×24", "F16"] and "blocks.1.attention.key.kernel" in row
    assert any(line.split()[:3] == ["model.norm.weight", "24", "F32"] for line in lines)
    assert any(line.startswith("GGUF, architecture llama, ") and line.endswith("15 F16, 5 F32")
               for line in lines)
    assert "family llama; configuration:" in lines and f"{path}: 20 tensors" in "\n".join(lines)

    exact = write_gguf(tmp_path / "b.gguf", llama)
    assert convert([str(exact), str(tmp_path / "out")]) == 0
    assert_same_weights(tilelli_jax.load(tmp_path / "out"), tilelli_jax.load(llama))
    assert tilelli_jax.load(tmp_path / "out").config == LLAMA
    assert convert([str(tmp_path / "out"), str(tmp_path / "back"), "--to", "torch"]) == 0
    files = [(path / "model.safetensors").read_bytes() for path in (llama, tmp_path / "back")]
    assert files[0] == files[1]
