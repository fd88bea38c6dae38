"""All estimators by name, and the presets of names that a study may ask for."""

from __future__ import annotations

from collections.abc import Sequence

from tilelli_jax.errors import InputError

from . import controls, likelihood, scores
from .interface import GROUPS as GROUPS
from .interface import Estimator, Need
from .probes import AbstainHead, FeatureProbe, LayerProbe, Mahalanobis, MassMean, Saplma, SemanticEntropyProbe
from .sidecar import SidecarEstimator

SIDECAR = "sidecar"
BOTH: tuple[Need, ...] = ("greedy", "samples")
ESTIMATORS: dict[str, Estimator] = {
    SIDECAR: SidecarEstimator(),
    "first_token_prob": scores.NextTokenScore(scores.first_token_prob),
    "first_token_entropy": scores.NextTokenScore(scores.first_token_entropy),
    "first_token_margin": scores.NextTokenScore(scores.first_token_margin),
    "layer_probe": LayerProbe(),
    "abstain_head": AbstainHead(),
    "mass_mean": MassMean(),
    "mass_mean_unwhitened": MassMean(whitened=False),
    "saplma": Saplma(),
    "mahalanobis": Mahalanobis(),
    "relative_mahalanobis": Mahalanobis(relative=True),
    "trilens": FeatureProbe("entropies"),
    "prompt_features": FeatureProbe("prompt_features"),
    "robustness": scores.ColumnScore("robustness", "prompt", ("robustness",), sign=-1),
    "semantic_entropy_probe": SemanticEntropyProbe(),
    "sequence_prob": scores.AnswerScore(likelihood.sequence_prob),
    "length_normalised": scores.AnswerScore(likelihood.length_normalised,
                                            "Malinin & Gales 2021, arXiv:2002.07650"),
    "min_token_prob": scores.AnswerScore(likelihood.min_token_prob),
    "mean_token_entropy": scores.AnswerScore(likelihood.mean_token_entropy,
                                             "Fomicheva et al. 2020, arXiv:2005.10608"),
    "self_certainty": scores.AnswerScore(likelihood.self_certainty, "Kang et al. 2025, arXiv:2502.18581"),
    "answer_probe": LayerProbe("answer_final", "answer"),
    "agreement": scores.ColumnScore("agreement", "answer", ("greedy", "agreement")),
    "p_true": scores.ColumnScore("p_true", "judgement", ("greedy", "p_true"),
                                 source="Kadavath et al. 2022, arXiv:2207.05221"),
    "verbalised": scores.ColumnScore("verbalised", "judgement", ("greedy", "verbalised"),
                                     source="Tian et al. 2023, arXiv:2305.14975"),
    "predictive_entropy": scores.SampleScore(scores.predictive_entropy,
                                             "Malinin & Gales 2021, arXiv:2002.07650"),
    "normalised_predictive_entropy": scores.SampleScore(scores.normalised_predictive_entropy,
                                                        "Malinin & Gales 2021, arXiv:2002.07650"),
    "semantic_entropy": scores.SampleScore(scores.semantic_entropy, "Kuhn et al. 2023, arXiv:2302.09664"),
    "discrete_semantic_entropy": scores.SampleScore(scores.discrete_semantic_entropy,
                                                    "Farquhar et al. 2024, doi:10.1038/s41586-024-07421-0"),
    "num_classes": scores.SampleScore(scores.num_classes, "Kuhn et al. 2023, arXiv:2302.09664"),
    "consistency": scores.SampleScore(scores.consistency, "Wang et al. 2023, arXiv:2203.11171", needs=BOTH),
    "lexical_similarity": scores.SampleScore(scores.lexical_similarity,
                                             "Fomicheva et al. 2020, arXiv:2005.10608"),
    "eigenscore": scores.SampleScore(scores.eigenscore, "Chen et al. 2024, arXiv:2402.03744"),
    "cocoa": scores.SampleScore(scores.cocoa_of(likelihood.sequence_prob),
                                "Vashurin et al. 2025, arXiv:2502.04964", needs=BOTH),
    "cocoa_normalised": scores.SampleScore(scores.cocoa_of(likelihood.length_normalised),
                                           "Vashurin et al. 2025, arXiv:2502.04964", needs=BOTH),
    "cocoa_entropy": scores.SampleScore(scores.cocoa_of(likelihood.mean_token_entropy),
                                        "Vashurin et al. 2025, arXiv:2502.04964", needs=BOTH),
    **{name: controls.Control(name) for name in controls.NAMES}}
CONTROLS = controls.NAMES
MEANINGS: dict[str, str] = {
    SIDECAR: "a GRU over the layers on logit-lens and MLP-write features",
    "first_token_prob": "the largest probability of the next token",
    "first_token_entropy": "minus the entropy of the next token",
    "first_token_margin": "the largest minus the second largest probability of the next token",
    "layer_probe": "logistic regression on the residual stream at the prompt's last position, at the layer "
                   "with the best validation AUROC",
    "abstain_head": "a linear head on the normalised stream of the last layer, at the prompt's last position",
    "mass_mean": "the residual stream along the difference of the means of known and unknown questions, "
                 "whitened",
    "mass_mean_unwhitened": "the residual stream along the difference of the means of known and unknown "
                            "questions",
    "saplma": "a network with three hidden layers on the residual stream",
    "mahalanobis": "minus the Mahalanobis distance to known questions",
    "relative_mahalanobis": "minus the distance to known questions relative to that to all questions",
    "trilens": "logistic regression on three entropies per layer",
    "prompt_features": "logistic regression on ten numbers of the prompt",
    "robustness": "minus the divergence under noise",
    "semantic_entropy_probe": "logistic regression on the residual stream that predicts a low semantic "
                              "entropy",
    "sequence_prob": "log-probability of the greedy answer",
    "length_normalised": "log-probability of the greedy answer, mean over its tokens",
    "min_token_prob": "log-probability of the least probable token of the greedy answer",
    "mean_token_entropy": "minus the entropy, mean over the tokens of the greedy answer",
    "self_certainty": "divergence of the greedy answer's tokens' distributions from the uniform one, mean",
    "answer_probe": "logistic regression on the residual stream at the last token of the greedy answer, at "
                    "the layer with the best validation AUROC",
    "agreement": "fraction of the paraphrases whose greedy answer has the same meaning",
    "p_true": "probability with which the network calls its answer true",
    "verbalised": "the probability that the network states in words",
    "predictive_entropy": "log-probability of the samples, mean",
    "normalised_predictive_entropy": "log-probability of the samples, mean over tokens and samples",
    "semantic_entropy": "log-probability of the samples' classes of equal meaning, mean",
    "discrete_semantic_entropy": "minus the entropy of the frequencies of the samples' classes of equal "
                                 "meaning",
    "num_classes": "minus the number of the samples' classes of equal meaning",
    "consistency": "fraction of the samples that mean the same as the greedy answer",
    "lexical_similarity": "ROUGE-L between the samples, mean",
    "eigenscore": "minus the mean log eigenvalue of the covariance of the samples' activations",
    "cocoa": "log-probability of the greedy answer times its mean distance from the samples",
    "cocoa_normalised": "log-probability per token of the greedy answer times its mean distance from the "
                        "samples",
    "cocoa_entropy": "minus the entropy per token of the greedy answer times its mean distance from the "
                     "samples",
    "words": "regression on the question's words", "length": "regression on the question's length",
    "dataset": "accuracy in the data set", "popularity": "regression on the popularity of the subject",
    "category": "accuracy in the category of questions",
    "answer_frequency": "for how many other questions of the category the network's answer would be correct"}
# Always part of a study: the sidecar, with which all others are compared, and the controls.
ALWAYS = (SIDECAR, *CONTROLS)
_EXTRA_PASSES = ("robustness", "semantic_entropy_probe")
PRESETS: dict[str, tuple[str, ...]] = {
    "free": ("first_token_prob", "first_token_entropy", "first_token_margin"),
    "prompt": tuple(name for name, estimator in ESTIMATORS.items()
                    if estimator.group == "prompt" and name not in _EXTRA_PASSES),
    "all": tuple(ESTIMATORS)}
DESCRIPTION = ("names of estimators, and presets: free (scores of the next token, nothing is learned), "
               "prompt (all that need one pass of the prompt), all; the sidecar and the controls are always "
               "included")


def chosen(names: Sequence[str]) -> dict[str, Estimator]:
    """Returns the estimators of names and presets, with those of ALWAYS, in the order of ESTIMATORS.

    Raises:
        InputError: a name is neither an estimator nor a preset.
    """
    selected = set(ALWAYS)
    for name in names:
        if name not in PRESETS and name not in ESTIMATORS:
            raise InputError(f"estimators: expected {', '.join(PRESETS)} or one of {', '.join(ESTIMATORS)}, "
                             f"found {name!r:.40}")
        selected |= set(PRESETS.get(name, (name,)))
    return {name: estimator for name, estimator in ESTIMATORS.items() if name in selected}


def needs(names: Sequence[str]) -> set[Need]:
    """Returns the measurements that these estimators and presets need."""
    return {need for estimator in chosen(names).values()
            for need in (*estimator.needs, *estimator.learns_with)}
