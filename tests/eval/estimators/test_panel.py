"""The estimators of the panel against independent restatements, and what each needs and learns from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tilelli_jax.errors import InputError
from tilelli_jax.eval.estimators import likelihood, panel, samples
from tilelli_jax.eval.estimators.config import FitConfig
from tilelli_jax.eval.estimators.interface import GROUPS, Training
from tilelli_jax.eval.estimators.likelihood import TokenStatistics
from tilelli_jax.eval.estimators.probes import two_class_threshold
from tilelli_jax.eval.estimators.table import QuestionTable, Samples
from tilelli_jax.eval.metrics import auroc
from tilelli_jax.signals.crystallisation import BY_LAYER

N, LAYERS, D = 400, 4, 6
OPTIONS = FitConfig(seeds=(0, 1), c_values=(0.1, 1.0), saplma_depths=(0.25, 0.75), jobs=1)


def table(seed: int = 0, **changed: Any) -> QuestionTable:
    """The label is a direction of layer 2 of `final` and of layer 1 of `answer_final`, with noise."""
    rng = np.random.default_rng(seed)
    known = rng.integers(0, 2, N)
    final, answer_final = rng.standard_normal((2, N, LAYERS, D))
    final[:, 2, 0] += 1.5 * known
    answer_final[:, 1, 3] += 2 * known
    greedy = [TokenStatistics(-rng.random(n), rng.random(n), rng.random(n)) for n in rng.integers(1, 5, N)]
    drawn = Samples(np.arange(0, N, 2), [[f"a{i}" for i in rng.integers(0, 3, 4)] for _ in range(N // 2)],
                    -5 * rng.random((N // 2, 4)), rng.integers(1, 4, (N // 2, 4)),
                    rng.standard_normal((N // 2, 4, D)), rng.integers(0, 3, (N // 2, 4)))
    columns: dict[str, Any] = {
        "by_layer": rng.random((N, LAYERS, 12)), "prompt_features": rng.random((N, 10)),
        "entropies": rng.random((N, LAYERS, 3)), "known": known, "refused": np.zeros(N, bool),
        "split": np.array(["train", "train", "validate", "calibrate", "test"])[np.arange(N) % 5],
        "group": np.arange(N), "text": np.array([f"question {i}" for i in range(N)]),
        "answer": np.array([f"a{i % 3}" for i in range(N)]), "dataset": np.full(N, "x"),
        "popularity": np.full(N, np.nan), "category": np.full(N, ""),
        "answers": [[f"a{i % 5}"] for i in range(N)],
        "final": final, "answer_final": answer_final, "robustness": rng.random(N), "greedy": greedy,
        "p_true": rng.random(N), "verbalised": rng.random(N), "agreement": rng.random(N), "samples": drawn}
    return QuestionTable(**(columns | changed))


def scores_of(name: str, data: QuestionTable) -> tuple[np.ndarray, dict[str, Any]]:
    method = panel.ESTIMATORS[name].fit(Training(data, data.rows("train"), data.rows("validate"), OPTIONS))
    assert method is not None and method.scores.shape[1] == N
    return method.scores, method.info


def test_scores_of_the_next_token_and_of_answers() -> None:
    data = table()
    largest, entropy, margin = (data.by_layer[:, -1, BY_LAYER.index(f"a_{name}_final")]
                                for name in ("maxprob", "entropy", "margin"))
    second = largest * np.exp(-margin)  # the ratio of two probabilities is the exponential of the margin
    for name, expected in (("first_token_prob", largest), ("first_token_entropy", -entropy),
                           ("first_token_margin", largest - second), ("robustness", -data.robustness),
                           ("p_true", data.p_true), ("verbalised", data.verbalised),
                           ("agreement", data.agreement),
                           ("sequence_prob", [tokens.log_probs.sum() for tokens in data.greedy]),
                           ("length_normalised", [tokens.log_probs.mean() for tokens in data.greedy]),
                           ("min_token_prob", [tokens.log_probs.min() for tokens in data.greedy]),
                           ("mean_token_entropy", [-tokens.entropies.mean() for tokens in data.greedy]),
                           ("self_certainty", [tokens.divergences.mean() for tokens in data.greedy])):
        np.testing.assert_allclose(scores_of(name, data)[0][0], expected, rtol=1e-12, atol=1e-12,
                                   err_msg=name)


def test_scores_of_samples_are_of_the_sampled_questions() -> None:
    data = table()
    drawn = data.samples
    for name in panel.ESTIMATORS:
        if panel.ESTIMATORS[name].group == "samples":
            values = scores_of(name, data)[0][0]
            np.testing.assert_array_equal(np.isnan(values), np.arange(N) % 2 == 1, err_msg=name)
    row = 5
    question, log_probs, classes = 2 * row, drawn.log_probs[row], drawn.classes[row]
    totals = [np.log(np.exp(log_probs[classes == c]).sum()) for c in classes]
    counts = np.bincount(classes)
    fractions = counts[counts > 0] / 4
    distance = np.mean([text != data.answer[question] for text in drawn.texts[row]])
    of_answer = data.greedy[question].log_probs.sum()
    for name, expected in (("predictive_entropy", log_probs.mean()),
                           ("normalised_predictive_entropy", (log_probs / drawn.lengths[row]).mean()),
                           ("semantic_entropy", np.mean(totals)),
                           ("discrete_semantic_entropy", (fractions * np.log(fractions)).sum()),
                           ("num_classes", -len(fractions)), ("consistency", 1 - distance),
                           ("eigenscore", samples.eigenscore(drawn.streams[row])),
                           ("lexical_similarity", np.mean([drawn.texts[row][i] == drawn.texts[row][j]
                                                           for i in range(4) for j in range(i)])),
                           ("cocoa", of_answer * distance),
                           ("cocoa_normalised",
                            likelihood.length_normalised(data.greedy[question]) * distance)):
        assert scores_of(name, data)[0][0, question] == pytest.approx(expected, abs=1e-12), name


def test_probes_find_their_layer() -> None:
    data = table()
    test = data.rows("test")
    for name, layer in (("layer_probe", 2), ("answer_probe", 1), ("mass_mean", 2),
                        ("mass_mean_unwhitened", 2)):
        values, info = scores_of(name, data)
        assert info["layer"] == layer and len(info["by_layer"]) == LAYERS, name
        assert auroc(data.known[test], values[0, test]) > 0.75, name


def test_saplma_learns_what_a_linear_probe_cannot() -> None:
    data = table()
    x = np.random.default_rng(3).standard_normal((N, LAYERS, D))
    known = (x[:, 1, 0] * x[:, 1, 1] > 0).astype(int)
    data = dataclasses.replace(data, final=x, known=known)
    test = data.rows("test")
    runs, info = scores_of("saplma", data)
    assert [run["layer"] for run in info["runs"]] == [1, 1]
    assert min(auroc(known[test], run[test]) for run in runs) > 0.75
    assert auroc(known[test], scores_of("layer_probe", data)[0][0, test]) < 0.65
    np.testing.assert_array_equal(scores_of("saplma", data)[0], runs, err_msg="the same seeds")


def test_mass_mean_is_the_difference_of_means() -> None:
    """Without whitening exactly; with it, the direction of linear discriminant analysis in the limit."""
    data = table()
    train = data.rows("train")
    values, known = data.final[train, 2], data.known[train]
    direction = values[known == 1].mean(0) - values[known == 0].mean(0)
    np.testing.assert_allclose(scores_of("mass_mean_unwhitened", data)[0][0], data.final[:, 2] @ direction,
                               rtol=1e-10, atol=1e-12)
    stretched = dataclasses.replace(data, final=data.final * np.array([1, 10, 1, 1, 1, 0.1]))
    test = data.rows("test")
    areas = [auroc(data.known[test], scores_of(name, stretched)[0][0, test])
             for name in ("mass_mean", "mass_mean_unwhitened")]
    assert areas[0] > 0.75 and areas[0] > areas[1]


def test_mahalanobis_distances() -> None:
    """Relative: the difference of two squared distances, which both standardise the same way."""
    data = table()
    plain, info = scores_of("mahalanobis", data)
    assert info["layer"] == int(0.6 * LAYERS) and (plain <= 0).all()
    relative = scores_of("relative_mahalanobis", data)[0][0]
    everyone = dataclasses.replace(data, known=np.ones(N, int))
    to_all = scores_of("mahalanobis", everyone)[0][0]
    np.testing.assert_allclose(relative, to_all**2 - plain[0]**2, rtol=1e-9, atol=1e-9)
    assert auroc(data.known, relative) > auroc(data.known, plain[0]), "the noise of all questions cancels"


def test_the_semantic_entropy_probe_learns_from_samples_only() -> None:
    data = table()
    drawn = data.samples
    certain = data.final[drawn.rows, 3, 2] > 0  # what the activations show is how far the samples agree
    classes = np.where(certain[:, None], 0, np.arange(4))
    data = dataclasses.replace(data, samples=dataclasses.replace(
        drawn, classes=classes, log_probs=np.full_like(drawn.log_probs, -3.0)))
    values, info = scores_of("semantic_entropy_probe", data)
    assert info["layer"] == 3 and not np.isnan(values).any(), "every question has a score"
    assert auroc((data.final[:, 3, 2] > 0).astype(int), values[0]) > 0.95
    other = dataclasses.replace(data, known=1 - data.known)
    np.testing.assert_array_equal(scores_of("semantic_entropy_probe", other)[0], values)
    equal = dataclasses.replace(data.samples, classes=np.zeros_like(classes))
    estimator = panel.ESTIMATORS["semantic_entropy_probe"]
    assert estimator.fit(Training(dataclasses.replace(data, samples=equal), data.rows("train"),
                                  data.rows("validate"), OPTIONS)) is None


def test_the_threshold_minimises_the_variance_within_two_classes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = np.round(rng.standard_normal(30), 1)  # with ties
        def within(threshold: float, values: np.ndarray = values) -> float:
            parts = values[values <= threshold], values[values > threshold]
            return sum(((part - part.mean())**2).sum() for part in parts if len(part))
        found = two_class_threshold(values)
        best = min(within(value) for value in np.unique(values)[:-1])
        assert within(found) == pytest.approx(best) and found not in values


def test_the_layer_probe_is_a_logistic_regression() -> None:
    data = table()
    train = data.rows("train")
    values, info = scores_of("layer_probe", data)
    x = data.final[:, info["layer"]]
    scaled = (x - x[train].mean(0)) / x[train].std(0)
    model = LogisticRegression(C=info["C"], max_iter=2000).fit(scaled[train], data.known[train])
    np.testing.assert_allclose(values[0], model.decision_function(scaled), rtol=1e-6, atol=1e-6)


def test_presets_and_names() -> None:
    always = {"sidecar", *panel.CONTROLS}
    assert set(panel.chosen([])) == always
    assert set(panel.chosen(["free"])) == always | {"first_token_prob", "first_token_entropy",
                                                    "first_token_margin"}
    assert list(panel.chosen(["all"])) == list(panel.ESTIMATORS)
    assert all(panel.ESTIMATORS[name].group in ("prompt", "control") for name in panel.chosen(["prompt"]))
    assert panel.needs(["prompt"]) == {"final"} and panel.needs(["free"]) == set()
    assert panel.needs(["p_true"]) == {"greedy", "p_true"}
    assert panel.needs(["semantic_entropy_probe"]) == {"final", "samples"}
    with pytest.raises(InputError, match=r"estimators: expected free, prompt, all or one of sidecar.*'laye'"):
        panel.chosen(["laye"])
    for name, estimator in panel.ESTIMATORS.items():
        assert estimator.group in GROUPS and panel.MEANINGS[name]


def test_an_estimator_needs_what_it_reads() -> None:
    """Each runs on a table that has only what it says it needs."""
    optional = [field.name for field in dataclasses.fields(QuestionTable) if field.default is None]
    for name, estimator in panel.ESTIMATORS.items():
        needed = {*estimator.needs, *estimator.learns_with}
        bare = table(**{key: None for key in optional if key not in needed and key != "greedy"})
        assert estimator.is_measured(bare)
        if name not in panel.ALWAYS:
            scores_of(name, bare)
        for need in needed - {"greedy"}:
            assert not estimator.is_measured(dataclasses.replace(bare, **{need: None})), name


def test_controls_of_categories() -> None:
    """Category: how often its questions are known; answer frequency: how often the answer is right there."""
    rng = np.random.default_rng(0)
    category = np.array(["capital", "language", ""])[np.arange(N) % 3]
    golds = np.where(category == "language", np.where(rng.random(N) < 0.7, "French", "Thai"),
                     [f"city{i % 40}" for i in range(N)])
    answer = np.where(category == "language", np.where(rng.random(N) < 0.8, "French", "Thai"), "city7")
    known = (answer == golds).astype(int)
    known[category == ""] = rng.integers(0, 2, (category == "").sum())
    data = table(category=category, answers=[[gold] for gold in golds], answer=answer, known=known)
    by_category = scores_of("category", data)[0][0]
    np.testing.assert_array_equal(np.isnan(by_category), category == "")
    train = data.rows("train")
    for name in ("capital", "language"):
        rows = train[category[train] == name]
        right = known[rows].sum()
        assert by_category[category == name] == pytest.approx(np.log((right + .5) / (len(rows) - right + .5)))
    frequency = scores_of("answer_frequency", data)[0][0]
    language = np.flatnonzero(category == "language")
    means = {text: frequency[language[answer[language] == text]].mean() for text in ("French", "Thai")}
    assert means["French"] > means["Thai"] and np.isnan(frequency[category == ""]).all()
    changed = dataclasses.replace(data, answers=[[gold] if i in train else ["other"]
                                                 for i, gold in enumerate(golds)])
    np.testing.assert_array_equal(scores_of("answer_frequency", changed)[0][0], frequency,
                                  err_msg="only correct answers of training questions are used")
    assert panel.ESTIMATORS["category"].fit(Training(table(), train, train, OPTIONS)) is None
