"""The model `tilelli` of lm_eval: the numbers and texts of its model `hf` on the same network."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm_eval (extra: lm-eval) is not installed here")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from tests.extras import needs_transformers
from tests.hugging_face_directory import BOS, END, WORDS, words_of, write_directory
from tests.reference_impl.random_weights import random_network
from tilelli_jax.convert.command import main as convert
from tilelli_jax.errors import InputError
from tilelli_jax.eval.harness import adapter
from tilelli_jax.eval.harness.adapter import TilelliLM
from tilelli_jax.generation.decoding import ContinuedIds, generate_ids
from tilelli_jax.loading import store
from tilelli_jax.models.llama import LlamaConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig

VANILLA = VanillaConfig(d_model=24, n_layers=1, max_seq_len=48, n_heads=3, dense_expand=2)
ROUTED = RoutedConfig(d_model=16, n_layers=2, max_seq_len=48, n_heads=2, d_head=6, top_k=4)
LLAMA = LlamaConfig(vocab_size=len(WORDS), d_model=24, layers=("full",) * 2, max_seq_len=32, n_heads=3,
                    n_kv_heads=1, d_head=8, d_hidden=40, bos_id=BOS, end_ids=(END,))
ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-4  # sums of up to some hundred log-probabilities below 10, each with float32 rounding


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def words(n: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(["a", "cat", "sat", "on", "mat"], n))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(path for `tilelli`, path for `hf`) of a network by name."""
    tmp_path = tmp_path_factory.mktemp("networks")

    def paths(name: str) -> tuple[Path, Path]:
        ours, theirs = tmp_path / name, tmp_path / f"{name}-hf"
        if name == "llama":
            if not ours.exists():
                write_directory(ours, LLAMA)
                settings = json.loads((ours / "tokenizer_config.json").read_text())
                settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
                (ours / "tokenizer_config.json").write_text(json.dumps(settings))
            return ours, ours
        if not ours.exists():
            store.save(random_network({"vanilla": VANILLA, "routed": ROUTED}[name], 0)[0], ours)
            assert convert([str(ours), str(theirs), "--to", "hf"]) == 0
        return ours, theirs
    return paths


def their_model(path: Path) -> Any:
    pytest.importorskip("accelerate", reason="accelerate, which lm_eval's model hf needs, is not installed")
    from lm_eval.models.huggingface import HFLM
    # A batch of 1: with more, `hf` attends to the padding of shorter contexts.
    return HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=1, trust_remote_code=True)


@needs_transformers
@pytest.mark.parametrize("name", ["vanilla", "llama", pytest.param("routed", marks=pytest.mark.exhaustive)])
def test_equals_hf(name: str, networks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    ours_path, theirs_path = networks(name)
    ours, theirs = TilelliLM(str(ours_path), batch_size=4), their_model(theirs_path)
    assert (ours.prefix_token_id, ours.eot_token_id, ours.max_length) == (
        theirs.prefix_token_id, theirs.eot_token_id, theirs.max_length)

    likely = " sat"
    if name == "llama":  # three rows, as below, so that they share the compiled program
        prompts = [ours.tok_encode("a cat")] * 3
        first, *_ = generate_ids(ours._model, prompts, max_new=12, temperature=0, end_ids=())
        likely = words_of(first.ids[:2])
    pairs = [("a cat", likely), ("a", " cat"), (words(4, 0), " sat on"), (words(40, 1), " " + words(3, 2)),
             ("", words(3, 3)), ("on  ", "mat"), ("<s> a", " cat"), ("\x00 cat", " é")]
    mine = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    np.testing.assert_allclose([row[0] for row in mine], [row[0] for row in expected], atol=TOLERANCE, rtol=0)
    assert [row[1] for row in mine] == [row[1] for row in expected]
    assert not all(row[1] for row in mine) and mine[0][1] == (name == "llama"), "the cases of this test"

    texts = [(words(8, 4),), (words(70, 5),)]
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True),
        theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True),
        atol=TOLERANCE, rtol=0)

    some = "cat" if name == "llama" else "\N{REPLACEMENT CHARACTER}"
    options = {"until": [some, "\n"], "max_gen_toks": 12}
    contexts = [(text, options) for text in ("a", "<s> a cat", words(40, 6))]
    if name == "routed":
        contexts += [(text, {"until": "no", "max_gen_toks": 20, "do_sample": False}) for text, _ in contexts]
    continued = ours.generate_until(requests("generate_until", *contexts), disable_tqdm=True)
    assert continued == theirs.generate_until(requests("generate_until", *contexts), disable_tqdm=True)
    assert any(continued) and not any(some in text for text in continued[:3])


@needs_transformers
def test_chat_template_equals_hf(networks: Any) -> None:
    ours_path, theirs_path = networks("llama")
    ours, theirs = TilelliLM(str(ours_path)), their_model(theirs_path)
    chat = [{"role": "user", "content": "who sat"}, {"role": "assistant", "content": "the cat"}]
    for begins in (True, False):
        text = ours.apply_chat_template(chat, begins)
        assert text == theirs.apply_chat_template(chat, begins) and text.startswith("<s> <user> who sat")
        assert text.endswith("<model>") == begins
        assert ours.tok_encode(text) == theirs.tok_encode(text), "a template's BOS is not doubled"
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_a_system_message_that_the_template_refuses_is_left_out(networks: Any, tmp_path: Path) -> None:
    write_directory(tmp_path, LLAMA, template=(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}"))
    model = TilelliLM(str(tmp_path))
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who"}]
    assert model.apply_chat_template(chat) == "who"
    bytes_only = TilelliLM(str(networks("vanilla")[0]))
    with pytest.raises(InputError, match="expected a chat template, found none"):
        bytes_only.apply_chat_template(chat)


@pytest.mark.parametrize(("until", "n", "expected"), [
    ("<user>", 3, "a cat"), ("<model>", 5, "a cat on"), ("> on", 4, "a cat on"), ("cat on", None, "a "),
    ("mat", None, "a cat on the")])
def test_stop_strings(until: str, n: int | None, expected: str, networks: Any,
                      monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found in the text with special tokens, which the result does not contain."""
    model = TilelliLM(str(networks("llama")[0]))
    tokenizer: Any = model._language.tokenizer
    tokenizer._tokenizer.add_special_tokens(["<user>", "<model>"])
    ids = np.array([WORDS.index(word) for word in ["a", "cat", "<user>", "on", "<model>", "the"]])

    def decoded(network: Any, prompts: Any, *, stop: Any, **options: Any) -> list[ContinuedIds]:
        assert stop(ids[:1]) is None and stop(ids) == n
        return [ContinuedIds(ids[:n], True)]
    monkeypatch.setattr(adapter, "generate_ids", decoded)
    options = {"until": [until], "max_gen_toks": 12}
    assert model.generate_until(requests("generate_until", ("a", options))) == [expected]


def test_sampling(networks: Any) -> None:
    model = TilelliLM(str(networks("llama")[0]), batch_size=2)
    options = {"until": ["</s>"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    rows = requests("generate_until", *[("a cat", options)] * 5)
    texts = model.generate_until(rows, disable_tqdm=True)
    assert len(set(texts)) > 1, "each request has its own random stream"
    assert texts == model.generate_until(rows, disable_tqdm=True)
    assert texts == TilelliLM(model.path, batch_size=5).generate_until(rows, disable_tqdm=True)


@pytest.mark.parametrize(("options", "expected"), [
    ({"do_sample": False}, {"temperature": 0.0}),
    ({"do_sample": False, "temperature": 0.0, "top_k": 3}, {"temperature": 0.0}),
    ({"do_sample": True, "temperature": 0.5, "num_beams": 1},
     {"temperature": 0.5, "top_k": 50, "top_p": 1.0}),
    ({"do_sample": True, "temperature": 2, "top_p": 0.9, "top_k": 0},
     {"temperature": 2.0, "top_k": 0, "top_p": 0.9})])
def test_options_of_sampling(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert adapter._sampling(options) == expected


@pytest.mark.parametrize(("options", "message"), [
    ({"do_sample": True}, "generation_kwargs.temperature: expected a number > 0 with do_sample, found 0"),
    ({"do_sample": False, "num_beams": 4}, "generation_kwargs.num_beams: expected 1, found 4"),
    ({"do_sample": False, "penalty_alpha": 1}, "and top_p, found penalty_alpha")])
def test_invalid_options_of_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        adapter._sampling(options)
    assert message in str(raised.value)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"batch_size": 0}, "batch_size: expected an integer ≥ 1, found 0"),
    ({"batch_size": "auto"}, "batch_size: expected an integer ≥ 1, found 'auto'"),
    ({"dtype": "float16"}, "dtype: expected float32 or bfloat16, found 'float16'"),
    ({"max_length": 49}, "max_length: expected an integer ≥ 1 and ≤ 48, the network's, found 49"),
    ({"tokenizer": "elsewhere"}, "tokenizer: expected none, as "),
    ({"prefix_token_id": 256}, "prefix_token_id: expected 0 to 255, found 256"),
    ({"pretrained": "x"}, "model_args: expected path, tokenizer, batch_size, "),
    ({"pretrained": "x"}, "max_batch_size, found pretrained")])
def test_invalid_arguments(arguments: dict[str, Any], message: str, networks: Any) -> None:
    with pytest.raises(InputError) as raised:
        TilelliLM(str(networks("vanilla")[0]), **arguments)
    assert message in str(raised.value)


def test_requests_that_do_not_fit(networks: Any) -> None:
    model = TilelliLM(str(networks("vanilla")[0]))
    with pytest.raises(InputError, match=r"max_gen_toks: expected 1 to 47, .* max_length 48, found 256"):
        model.generate_until(requests("generate_until", ("a", {"until": ["b"]})))
    with pytest.raises(InputError, match="continuation: expected 1 to 48 tokens"):
        model.loglikelihood(requests("loglikelihood", ("a", "b" * 49)), disable_tqdm=True)
    with pytest.raises(InputError, match="expected at least one token, found an empty text"):
        model.generate_until(requests("generate_until", ("", {"until": ["b"], "max_gen_toks": 2})))


def test_the_prefix_token(networks: Any, tmp_path: Path) -> None:
    assert TilelliLM(str(networks("vanilla")[0])).prefix_token_id == 0
    write_directory(tmp_path, dataclasses.replace(LLAMA, end_ids=()))
    settings = tmp_path / "tokenizer_config.json"
    for tree, expected in (({}, BOS), ({"bos_token": None, "eos_token": {"content": "</s>"}}, END),
                           ({"bos_token": None}, None)):
        settings.write_text(json.dumps(tree))
        model = TilelliLM(str(tmp_path))
        if expected is None:
            with pytest.raises(InputError, match="prefix_token_id: expected a token"):
                _ = model.prefix_token_id
            assert TilelliLM(str(tmp_path), prefix_token_id=3).prefix_token_id == 3
        else:
            assert model.prefix_token_id == expected


def test_lm_eval_knows_the_model() -> None:
    assert get_model("tilelli") is TilelliLM
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"lm_eval.models": {"tilelli": f"{TilelliLM.__module__}:{TilelliLM.__qualname__}"}}


def test_settings_of_greedy_decoding_that_hf_uses_are_named(networks: Any, tmp_path: Path,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "network"
    shutil.copytree(networks("vanilla")[1], path)
    for settings, expected in (
            ({"repetition_penalty": 1.1, "temperature": 0.5}, "repetition_penalty 1.1: not used"),
            ({"repetition_penalty": 1.0, "min_length": 0, "top_k": 3}, None)):
        (path / "generation_config.json").write_text(json.dumps(settings))
        caplog.clear()
        adapter._warn_of_generation_config(str(path))
        found = [record.getMessage() for record in caplog.records]
        assert (expected is None and not found) or (expected and expected in found[0]), found
