"""P(knows) on a chat network, compared with PyTorch, on one device and on eight."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import expit

from tests.error_lines import assert_one_line
from tests.eval.recall.small import VANILLA
from tests.reference_impl.random_weights import random_network
from tests.references import STORED, needs
from tilelli_jax.convert.command import main as convert
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.eval.calibration import Platt
from tilelli_jax.eval.recall import verdicts
from tilelli_jax.eval.recall.config import PromptConfig
from tilelli_jax.eval.recall.predictor import KnowledgePredictor
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.loading import store
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.signals.crystallisation import BY_LAYER, PROMPT_FEATURES

GEMMA = STORED / "recall_cases" / "tiny_gemma4_with_tokenizer"
LRD = STORED / "checkpoints" / "lrd.pt"
QUESTIONS = ["Who wrote Emma?", "What is the capital of Peru, and of which river is it the mouth?", "Why?"]

pytestmark = [needs(GEMMA), needs(LRD)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published sidecar, converted."""
    pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    path = tmp_path_factory.mktemp("sidecar") / "lrd"
    assert convert([str(LRD), str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def predictor(published: Path) -> KnowledgePredictor:
    return KnowledgePredictor.open(GEMMA, published)


def reference_probability(by_layer: np.ndarray, prompt_features: np.ndarray) -> float:
    """P(knows) from PyTorch's GRU with the unchanged tensors of lrd.pt."""
    import _codecs

    import torch
    from numpy.dtypes import Float32DType, Float64DType, StrDType
    from torch.serialization import safe_globals
    kinds = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np._core.multiarray.scalar, Float32DType,
             Float64DType, StrDType]
    with safe_globals([*kinds, _codecs.encode]):
        stored = torch.load(LRD, map_location="cpu", weights_only=True)
    state, scale = stored["state_dict"], stored["fscaler"]
    gru = torch.nn.GRU(12, 96, batch_first=True)
    gru.load_state_dict({name.removeprefix("gru."): value for name, value in state.items()
                         if name.startswith("gru.")})
    x = torch.tensor((by_layer[None] - scale["mean"]) / scale["std"], dtype=torch.float32)
    g = torch.tensor((prompt_features[None] - stored["gscaler"]["mean"]) / stored["gscaler"]["scale"],
                     dtype=torch.float32)
    with torch.no_grad():
        states, last = gru(x)
        u = torch.cat([states.mean(1), last[0], g], dim=1)
        hidden = torch.relu(u @ state["head.0.weight"].T + state["head.0.bias"])
        logit = hidden @ state["head.3.weight"].T + state["head.3.bias"]
    return float(torch.sigmoid(logit / stored["T"]))


def test_the_published_sidecar_on_a_chat_network(predictor: KnowledgePredictor) -> None:
    """Question → prompt → one pass → 12 × layers and 10 features → P(knows)."""
    predictions = predictor.predict(QUESTIONS)
    for question, prediction in zip(QUESTIONS, predictions, strict=True):
        features = prediction.outputs.crystallisation
        assert features.by_layer.shape == (12, 12) and prediction.question == question
        assert prediction.p == pytest.approx(reference_probability(features.by_layer,
                                                                   features.prompt_features), abs=1e-5)
        assert prediction.verdict is None, "lrd.pt has no thresholds"
        assert 4 <= prediction.strongest_layer <= 9
    # Another position in the batch, other neighbours, and no padding.
    others = predictor.predict([QUESTIONS[1], "Who are you?", "Where?"])
    assert others[0].p == pytest.approx(predictions[1].p, abs=1e-5)


@pytest.mark.exhaustive
def test_batched_equals_single(predictor: KnowledgePredictor) -> None:
    alone = predictor.predict(QUESTIONS[1:2])[0]
    assert alone.p == pytest.approx(predictor.predict(QUESTIONS)[1].p, abs=1e-5), "batched or one by one"


@pytest.mark.exhaustive
@pytest.mark.eight_devices
def test_eight_devices_equal_one(published: Path) -> None:
    predictor = KnowledgePredictor.open(GEMMA, published, mesh=make_mesh(MeshConfig(data=4, tensor=2)))
    alone = KnowledgePredictor.open(GEMMA, published)
    assert len(jax.devices()) == 8
    np.testing.assert_allclose([prediction.p for prediction in predictor.predict(QUESTIONS)],
                               [prediction.p for prediction in alone.predict(QUESTIONS)], atol=1e-5)


def test_thresholds_and_calibration(published: Path, tmp_path: Path) -> None:
    rule = VerdictRule(Platt(2.0, -0.5), 0.7, 0.2, {"precision": 0.9}, {},
                       PromptConfig("{question}", " Short."))
    sidecar = store.load(published)
    store.save(sidecar, tmp_path / "s")
    verdicts.write(tmp_path / "s", rule)
    assert verdicts.read(tmp_path / "s") == rule
    network = tmp_path / "network"
    store.save(random_network(VANILLA, 0)[0], network)
    predictor = KnowledgePredictor.open(network, tmp_path / "s")
    assert predictor.prompter.text("Who?") == "Who? Short."
    prediction = predictor.predict(QUESTIONS)[0]
    plain = KnowledgePredictor.open(network, published, prompt=rule.prompt).predict(QUESTIONS)[0]
    logit = np.log(plain.p / (1 - plain.p))
    assert prediction.p == pytest.approx(float(expit(2 * logit - 0.5)), abs=1e-6)
    assert prediction.verdict == ("likely knows" if plain.p >= 0.7 else
                            "likely beyond its knowledge" if plain.p < 0.2 else "uncertain")
    assert rule.thresholds == pytest.approx(
        (expit(2 * np.log(0.7 / 0.3) - 0.5), expit(2 * np.log(0.25) - 0.5)))


def test_invalid_input(predictor: KnowledgePredictor, tmp_path: Path) -> None:
    def rejected(call: object, *parts: str) -> None:
        with pytest.raises(InputError) as caught:
            call()  # type: ignore[operator]
        assert_one_line(f"error: {caught.value}\n", *parts)
    wrong = VerdictRule(network={"name": "other", "fingerprint": "x", "n_layers": 42})
    store.save(store.build(SidecarConfig(features=BY_LAYER, prompt_features=PROMPT_FEATURES)), tmp_path / "s")
    verdicts.write(tmp_path / "s", wrong)
    rejected(lambda: KnowledgePredictor.open(GEMMA, tmp_path / "s"),
             "trained on another network: expected 42 layers",
            "found 12; --any-network")
    assert KnowledgePredictor.open(GEMMA, tmp_path / "s", any_network=True).rule == wrong
    rejected(lambda: predictor.predict(["Why?", " "]), "question 2: expected text, found an empty question")
    rejected(lambda: predictor.predict([" "]), "the question: expected text, found an empty question")
