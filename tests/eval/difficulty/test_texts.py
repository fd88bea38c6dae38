"""Asking questions, against the small stored run of the published study's scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.difficulty import labels, texts
from tests.refusals import assert_one_line
from tilelli_jax.errors import InputError
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.nn.tap import Tap
from tilelli_jax.store import build

SHARED = Path(__file__).parents[4] / "shared" / "reference"
TINY = SHARED / "difficulty" / "tiny_world"
needs_reference = pytest.mark.skipif(not TINY.exists(),
                                     reason="the stored references do not come with this project")


@pytest.fixture(scope="module")
def asked() -> tuple[list[texts.Question], texts.Answers]:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(SHARED / "data" / "neox_20B_tokenizer.json"))
    questions = texts.squad(texts.read_rows(TINY / "squad.json"), "squad.json")
    model = FlaxGPTNeoXForCausalLM.from_pretrained(TINY / "tiny_cheap")
    found = texts.answer(model, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, questions,
                         most_tokens=texts.SQUAD_TOKENS, place="resid_post", layers=(1, 3))
    return questions, found


def stored(name: str) -> dict[str, np.ndarray]:
    import pyarrow.parquet
    table = pyarrow.parquet.read_table(TINY / name / "squad_metadata.parquet").to_pydict()
    return {column: np.asarray(values) for column, values in table.items()}


@needs_reference
def test_surprise_and_activations(asked: tuple[list[texts.Question], texts.Answers]) -> None:
    import safetensors.numpy
    questions, found = asked
    expected = stored("act")
    assert [question.prompt for question in questions] == expected["prompt"].tolist()
    np.testing.assert_allclose(np.exp(found.ending_nats[:, 0]), expected["perplexity"], rtol=2e-5)
    np.testing.assert_allclose(np.exp(found.prompt_nats), expected["prompt_perplexity"], rtol=2e-5)
    for layer, name in ((1, "act"), (3, "act_late")):
        arrays = safetensors.numpy.load_file(TINY / name / "squad_activations.safetensors")
        theirs = arrays["encoder_embeddings"]
        ours = found.activations[layer]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float),
                                   atol=2e-3, rtol=2e-3)  # a float16's step
        assert (ours == theirs).mean() > 0.98


@needs_reference
def test_labels_and_splits(asked: tuple[list[texts.Question], texts.Answers]) -> None:
    questions, found = asked
    expected = stored("act")
    split = labels.purged(labels.split_in_order(300), [question.prompt for question in questions],
                          found.prompt_nats, fit_on_all=True)
    assert split.tolist() == expected["split"].tolist()
    perplexity = np.exp(found.ending_nats[:, 0])
    norm = labels.standardised(perplexity, split == "train")
    np.testing.assert_allclose(norm, expected["perplexity_norm"], atol=1e-4)
    hard = labels.hard_by_quantile(found.ending_nats[:, 0], split == "train")  # a rising map changes nothing
    assert hard.tolist() == expected["difficulty"].tolist()


def test_several_endings() -> None:
    """HellaSwag's: each ending's surprise and the stream at its first token, beside each ending alone."""
    model = build(GPTNeoXConfig(vocab_size=256, d_model=16, n_layers=2, n_heads=2, d_hidden=32), 0)
    rows = [{"ctx_a": "A cat", "ctx_b": "sits", "endings": [" down.", "up the tree", "by", "on"],
             "label": "1", "activity_label": "Cats"},
            {"ctx_a": "Two dogs", "ctx_b": "", "endings": ["bark", "run off", "sleep", "eat it"],
             "label": 3, "activity_label": "Dogs"}]
    questions = texts.hellaswag(rows, "rows")
    assert questions[0].prompt == "A cat sits" and questions[0].endings[0] == " down."
    assert questions[1].right == 3

    def encode(text: str) -> list[int]:
        return list(text.encode())
    found = texts.answer(model, encode, questions, most_tokens=6, place="resid_post", layers=(1,),
                         batch_size=3, dtype=np.float32)
    for i, question in enumerate(questions):
        prompt = encode(question.prompt)[-6:]
        assert found.prompt_tokens[i] == 6
        for j, ending in enumerate(question.endings):
            ids = np.array([prompt + encode(ending)])
            logits, seen = model.tapped(ids, Tap(record=("resid_post",)))
            logits = np.asarray(logits[0], np.float64)
            nats = np.log(np.exp(logits).sum(axis=1))[:-1] - logits[np.arange(len(ids[0]) - 1), ids[0, 1:]]
            assert found.ending_nats[i, j] == pytest.approx(nats[5:].mean(), abs=1e-5)
            assert found.prompt_nats[i] == pytest.approx(nats[:5].mean(), abs=1e-5)
            np.testing.assert_allclose(found.activations[1][i, j], seen["resid_post"][1, 0, 6], atol=1e-5)
            assert found.ending_tokens[i, j] == len(ending)


def test_layers_in_any_order_and_none() -> None:
    model = build(GPTNeoXConfig(vocab_size=256, d_model=16, n_layers=3, n_heads=2, d_hidden=32), 0)
    questions = [texts.Question("A b c", (" d",), 0, "", "")]
    found = {layers: texts.answer(model, lambda text: list(text.encode()), questions, most_tokens=9,
                                  place="resid_post", layers=layers) for layers in ((0, 2), (2, 0), ())}
    for layer in (0, 2):
        np.testing.assert_array_equal(found[0, 2].activations[layer], found[2, 0].activations[layer])
    assert not found[()].activations and found[()].ending_nats == found[0, 2].ending_nats


def test_what_is_not_finite_is_named() -> None:
    model: Any = build(GPTNeoXConfig(vocab_size=256, d_model=16, n_layers=2, n_heads=2, d_hidden=32), 0)
    model.unroll()
    model.blocks[1].mlp.down.bias[...] += 1e6  # no float16
    question = texts.Question("A b c", (" d",), 0, "", "")
    with pytest.raises(InputError, match=r"item [01], layer 1: activations are not finite as float16"):
        texts.answer(model, lambda text: list(text.encode()), [question, question], most_tokens=9,
                     place="resid_post", layers=(0, 1))


def test_prompts_too_alike_are_left_out() -> None:
    prompts = ["the cat sat on the mat", "the dog ran in the park", "a cat and a dog",
               "the cat sat on the mat .", "nothing of the kind"]
    split = np.array(["train", "train", "train", "test", "test"])
    found = labels.purged(split, prompts, np.array([3.0, 0.1, 3.0, 3.0, 3.0]))
    assert found.tolist() == ["train", "purge", "train", "purge", "test"]
    assert split.tolist() == ["train", "train", "train", "test", "test"]


@pytest.mark.parametrize(("content", "parts"), [
    ("[]", ["expected rows"]), ("{", ["cannot be read"]), ('[{"context": "a"}]', ["row 0", "question"])])
def test_refusals(content: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        texts.squad(texts.read_rows(path), str(path))
    assert_one_line(f"error: {caught.value}\n", str(path), *parts)
