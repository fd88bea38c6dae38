"""Scoring questions: batches agree with each text alone, and with a stored run of the published scripts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference_impl.random_weights import random_network
from tests.references import STORED, needs
from tilelli_jax.errors import InputError
from tilelli_jax.eval.difficulty import labels, texts
from tilelli_jax.eval.difficulty.config import SquadConfig
from tilelli_jax.eval.difficulty.scoring import Answers, NLLScorer
from tilelli_jax.eval.inputs.rows import read_rows
from tilelli_jax.loading.store import from_arrays
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.signals.batching import SHORTEST

TINY = STORED / "difficulty" / "tiny_world"
needs_reference = needs(TINY)
CONFIG = GPTNeoXConfig(vocab_size=256, d_model=16, n_layers=2, n_heads=2, d_hidden=32)


@pytest.fixture(scope="module", params=[20, pytest.param(1, marks=pytest.mark.exhaustive)])
def scored(request: pytest.FixtureRequest) -> tuple[slice, list[texts.TextItem], Answers]:
    """The selection of stored rows, their questions, and the network's scores."""
    rows = slice(None, None, request.param)
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(STORED / "data" / "neox_20B_tokenizer.json"))
    questions = texts.squad(read_rows(TINY / "squad.json"), "squad.json")[rows]
    model = FlaxGPTNeoXForCausalLM.from_pretrained(TINY / "tiny_cheap")
    scorer = NLLScorer(model, lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
                       max_tokens=SquadConfig().max_tokens, hook="resid_post", layers=(1, 3))
    return rows, questions, scorer.score(questions)


def stored(name: str) -> dict[str, np.ndarray]:
    import pyarrow.parquet
    table = pyarrow.parquet.read_table(TINY / name / "squad_metadata.parquet").to_pydict()
    return {column: np.asarray(values) for column, values in table.items()}


@needs_reference
def test_nll_and_activations_match_the_stored_run(
        scored: tuple[slice, list[texts.TextItem], Answers]) -> None:
    import safetensors.numpy
    rows, questions, answers = scored
    expected = {name: values[rows] for name, values in stored("act").items()}
    assert [question.prompt for question in questions] == expected["prompt"].tolist()
    np.testing.assert_allclose(np.exp(answers.ending_nll[:, 0]), expected["perplexity"], rtol=2e-5)
    np.testing.assert_allclose(np.exp(answers.prompt_nll), expected["prompt_perplexity"], rtol=2e-5)
    for layer, name in ((1, "act"), (3, "act_late")):
        arrays = safetensors.numpy.load_file(TINY / name / "squad_activations.safetensors")
        theirs = arrays["encoder_embeddings"][rows]
        ours = np.stack(answers.activations[layer])  # one position per item
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float),
                                   atol=2e-3, rtol=2e-3)  # the precision of float16
        assert (ours == theirs).mean() > 0.98


@needs_reference
def test_labels_and_splits_match_the_stored_run() -> None:
    questions, expected = texts.squad(read_rows(TINY / "squad.json"), "squad.json"), stored("act")
    perplexity = expected["perplexity"]
    split = labels.purged(labels.split_in_order(300), [question.prompt for question in questions],
                          np.log(expected["prompt_perplexity"]))
    assert split.tolist() == expected["split"].tolist()
    train = perplexity[split == "train"]
    norm = (perplexity - train.mean()) / (train.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(norm, expected["perplexity_norm"], atol=1e-4)
    hard = labels.hard_by_quantile(np.log(perplexity), split == "train")  # invariant under monotone maps
    assert hard.tolist() == expected["difficulty"].tolist()


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture(scope="module")
def model() -> Any:
    return random_network(CONFIG, 0)[0]


def changed(layer: int | None, token: str, value: float) -> Any:
    """Returns the network with a layer's MLP bias, or with a token's embedding, set to a value."""
    arrays = dict(random_network(CONFIG, 0)[1])
    name = "embed.kernel" if layer is None else f"blocks.{layer}.mlp.down.bias"
    array = arrays[name] = arrays[name].copy()
    (array[ord(token)] if layer is None else array)[...] = value
    return from_arrays(CONFIG, arrays)


@pytest.fixture(scope="module")
def alone(model: Any) -> Callable[[list[int]], tuple[np.ndarray, np.ndarray]]:
    """Runs one text alone: NLL of each token after the first, and stream `[layers, time, d_model]`."""
    run = jax.jit(lambda ids: model.tapped(ids, Tap(record=("resid_post",))))

    @functools.cache
    def scores(ids: bytes) -> tuple[np.ndarray, np.ndarray]:
        logits, recorded = run(jnp.asarray([list(ids)]))
        logits = np.asarray(logits[0], np.float64)
        nats = np.log(np.exp(logits).sum(axis=1))[:-1] - logits[np.arange(len(ids) - 1), list(ids[1:])]
        return nats, np.asarray(recorded["resid_post"][:, 0])
    return lambda ids: scores(bytes(ids))


def hellaswag_questions() -> list[texts.TextItem]:
    rows = [{"ctx_a": "A cat", "ctx_b": "sits", "endings": [" down.", "up the tree", "by", "on"],
             "label": "1", "activity_label": "Cats"},
            {"ctx_a": "Two dogs", "ctx_b": "", "endings": ["bark", "run off", "sleep", "eat it"],
             "label": 3, "activity_label": "Dogs"}]
    return texts.hellaswag(rows, "rows")


def test_several_endings(model: Any, alone: Any) -> None:
    """HellaSwag: each ending's NLL and the stream at its first token agree with the ending scored alone."""
    questions = hellaswag_questions()
    assert questions[0].prompt == "A cat sits" and questions[0].endings[0] == " down."
    assert questions[1].right == 3
    answers = NLLScorer(model, encode, max_tokens=6, hook="resid_post", layers=(1,), batch_size=3,
                        dtype=np.float32).score(questions)
    for i, question in enumerate(questions):
        prompt = encode(question.prompt)[-6:]
        assert answers.prompt_tokens[i] == 6
        assert answers.activations[1][i].shape == (4, 16)
        for j, ending in enumerate(question.endings):
            nats, stream = alone(prompt + encode(ending))
            assert answers.ending_nll[i, j] == pytest.approx(nats[5:].mean(), abs=1e-5)
            assert answers.prompt_nll[i] == pytest.approx(nats[:5].mean(), abs=1e-5)
            np.testing.assert_allclose(answers.activations[1][i][j], stream[1, 6], atol=1e-5)
            assert answers.ending_tokens[i, j] == len(ending)


def test_all_positions_of_the_prompt(model: Any, alone: Any) -> None:
    """Returns the positions from `skip`, but always the last; with several endings the prompt counts once."""
    one_ending = [texts.TextItem(prompt, (" d",), 0, "", "")
                  for prompt in ("A b c", "Abcdef", "z" * 40, "yx")]
    scorer = NLLScorer(model, encode, max_tokens=6, hook="resid_post", layers=(1, 0), positions="all",
                       batch_size=3, dtype=np.float32)
    for questions in (one_ending, hellaswag_questions()):
        for scorer.skip in (0, 1, 3, 50):
            answers = scorer.score(questions)
            for i, question in enumerate(questions):
                prompt = encode(question.prompt)[-6:]
                start = min(scorer.skip, len(prompt) - 1)
                for layer in (0, 1):
                    values = answers.activations[layer][i]
                    assert values.shape == (len(prompt) - start, 16) and values.dtype == np.float32
                    # Causal: the ending does not change the stream of the prompt.
                    np.testing.assert_allclose(values, alone(prompt)[1][layer, start:], atol=1e-5)


def test_with_one_ending_the_boundary_is_the_last_token_of_the_prompt(model: Any, alone: Any) -> None:
    questions = [texts.TextItem(prompt, (" def",), 0, "", "") for prompt in ("Ab c", "Abcdefgh")]
    answers = NLLScorer(model, encode, max_tokens=6, hook="resid_post", layers=(1,),
                        dtype=np.float32).score(questions)
    for i, question in enumerate(questions):
        prompt = encode(question.prompt)[-6:]
        nats, stream = alone(prompt + encode(" def"))
        np.testing.assert_allclose(answers.activations[1][i], stream[1, [len(prompt) - 1]], atol=1e-5)
        assert answers.ending_nll[i, 0] == pytest.approx(nats[len(prompt) - 1:].mean(), abs=1e-5)


def test_layers_in_any_order_and_none() -> None:
    model = random_network(dataclasses.replace(CONFIG, n_layers=3), 0)[0]
    questions = [texts.TextItem("A b c", (" d",), 0, "", "")]
    answers = {layers: NLLScorer(model, encode, max_tokens=9, hook="resid_post",
                                 layers=layers).score(questions)
               for layers in ((0, 2), (2, 0), ())}
    for layer in (0, 2):
        np.testing.assert_array_equal(answers[0, 2].activations[layer], answers[2, 0].activations[layer])
    assert (answers[0, 2].activations[0][0] != answers[0, 2].activations[2][0]).any()
    assert not answers[()].activations
    assert answers[()].ending_nll == pytest.approx(answers[0, 2].ending_nll, rel=1e-5)


def test_a_prompt_of_one_token_has_no_nll(model: Any) -> None:
    answers = NLLScorer(model, encode, max_tokens=1).score([texts.TextItem("Abc", (" d",), 0, "", "")])
    assert answers.prompt_tokens.tolist() == [1] and np.isnan(answers.prompt_nll).all()
    assert np.isfinite(answers.ending_nll).all()


def test_the_next_call_does_not_recompile(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[tuple[int, ...]] = []
    tapped = FlaxGPTNeoXForCausalLM.tapped
    monkeypatch.setattr(FlaxGPTNeoXForCausalLM, "tapped",
                        lambda self, ids, tap: traced.append(ids.shape) or tapped(self, ids, tap))
    scorer = NLLScorer(model, encode, max_tokens=9, hook="resid_post", layers=(1,), batch_size=2)
    questions = [texts.TextItem("A b c", (" d",), 0, "", ""), texts.TextItem("Abc", (" def",), 0, "", "")] * 3
    parts = [scorer.score(questions[:3]), scorer.score(questions[3:])]
    assert traced == [(2, SHORTEST)]
    together = scorer.score(questions)
    np.testing.assert_array_equal(np.concatenate([part.ending_nll for part in parts]), together.ending_nll)


@pytest.mark.parametrize("positions", ["boundary", "all"])
def test_nonfinite_activations_are_reported(positions: Any) -> None:
    question = texts.TextItem("A b c", (" d",), 0, "", "")
    scorer = NLLScorer(changed(1, "", 1e6), encode, max_tokens=9, hook="resid_post", layers=(0, 1),
                       positions=positions)
    with pytest.raises(InputError, match=r"item [01], layer 1: activations are not finite as float16"):
        scorer.score([question, question])


@pytest.mark.parametrize("positions", ["boundary", "all"])
def test_the_error_names_the_item_with_nonfinite_activations(positions: Any) -> None:
    model = changed(None, "Z", 1e6)  # exceeds float16
    questions = [texts.TextItem(prompt, (" d",), 0, "", "") for prompt in ("Abcd", "AbcZ", "Abcde")]
    scorer = NLLScorer(model, encode, max_tokens=9, hook="resid_post", layers=(1,), positions=positions)
    for numbers, expected in ((None, 1), ([4, 17, 21], 17), (range(6, 9), 7)):
        with pytest.raises(InputError, match=f"^item {expected}, layer 1: activations are not finite as "
                                             "floa"):
            scorer.score(questions, numbers)
    scorer.dtype = np.float32
    assert np.abs(scorer.score(questions).activations[1][1]).max() > 1e5


def test_a_nonfinite_nll_is_reported() -> None:
    questions = [texts.TextItem("Abc", (" d", ending), 0, "", "") for ending in (" e", "Z e")]
    with pytest.raises(InputError, match=r"^item 31: the NLL of ending 1 is not finite$"):
        NLLScorer(changed(None, "Z", np.nan), encode, max_tokens=9).score(questions, [30, 31])


@pytest.mark.parametrize(("question", "message"), [
    (texts.TextItem("", (" d",), 0, "", ""), "token in the prompt"),
    (texts.TextItem("A", ("",), 0, "", ""), "in each of 1 endings"),
    (texts.TextItem("A", (" d", " e"), 0, "", ""), "in each of 1 endings")])
def test_an_empty_prompt_or_ending_is_rejected(question: texts.TextItem, message: str, model: Any) -> None:
    scorer = NLLScorer(model, encode, max_tokens=9)
    with pytest.raises(InputError, match=f"^item 9: expected .*{message}"):
        scorer.score([texts.TextItem("A", (" d",), 0, "", ""), question], [8, 9])


def test_texts_beyond_learned_positions_are_rejected() -> None:
    model = random_network(VanillaConfig(d_model=16, n_layers=1, max_seq_len=40, n_heads=2), 0)[0]
    questions = [texts.TextItem("a" * 60, ("b" * n,), 0, "", "") for n in (4, 5)]
    assert np.isfinite(NLLScorer(model, encode, max_tokens=35).score(questions).ending_nll).all()
    with pytest.raises(InputError, match=r"^item 1: expected at most 40 tokens, .* found 41 in prompt and "
                                         r"ending; data\.max_tokens"):
        NLLScorer(model, encode, max_tokens=36).score(questions)


def test_the_tokenizer_of_another_network_is_rejected() -> None:
    model = random_network(GPTNeoXConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, d_hidden=32), 0)[0]
    scorer = NLLScorer(model, lambda text: list(text.encode()), max_tokens=9)
    with pytest.raises(InputError, match=r"item 7: expected token ids below .* size 50, found 66"):
        scorer.score([texts.TextItem("AB", ("B",), 0, "", "")], [7])
