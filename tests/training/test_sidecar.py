"""Training a sidecar: accuracy, scalers, early stopping and the update rule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from tests.reference_impl.comparison import assert_same_weights
from tilelli_jax.estimators.fit_sidecar import (
    Examples,
    SidecarOptions,
    fit_scalers,
    fit_sidecar,
    sidecar_logits,
)
from tilelli_jax.estimators.sidecar import Sidecar, SidecarConfig
from tilelli_jax.eval.metrics import auroc
from tilelli_jax.models.arrays import to_arrays

SMALL = SidecarOptions(d_hidden=8, epochs=15, batch_size=50)


def examples(n: int, seed: int, *, shift: float = 0.0) -> Examples:
    """Known if a feature rises with depth: neither a single layer nor the global features suffice."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, 5, 3)).astype(np.float32)
    known = rng.integers(0, 2, n)
    features[:, :, 1] += (2 * known - 1)[:, None] * np.linspace(-1.5, 1.5, 5) + shift
    return Examples(features, rng.standard_normal((n, 4)).astype(np.float32) * 3 + 7, known)


def test_it_learns_a_trend_over_layers() -> None:
    train, validate, test = (examples(n, seed) for seed, n in enumerate((400, 100, 300)))
    result = fit_sidecar(train, validate, auroc, SMALL, names=("a", "b", "c"),
                         prompt_feature_names=tuple("defg"),
                         seed=3)
    scores = sidecar_logits(result.sidecar, test.features, test.prompt_features)
    assert auroc(test.known, scores) > 0.93
    assert result.best_epoch == int(np.argmax(result.scores)) + 1 and len(result.scores) <= SMALL.epochs
    # The sidecar is that of the best epoch, not of the last.
    again = sidecar_logits(result.sidecar, validate.features, validate.prompt_features)
    assert auroc(validate.known, again) == pytest.approx(max(result.scores), abs=1e-12)
    assert result.sidecar.config == SidecarConfig(n_features=3, n_prompt_features=4, d_hidden=8,
                                                  features=("a", "b", "c"), prompt_features=tuple("defg"))


@pytest.mark.exhaustive
def test_the_seed_determines_the_weights() -> None:
    train, validate = examples(120, 0), examples(60, 1)
    options = SidecarOptions(d_hidden=4, epochs=2, batch_size=50)
    a, b, c = (to_arrays(fit_sidecar(train, validate, auroc, options, seed=seed).sidecar)
               for seed in (1, 1, 2))
    assert_same_weights(a, b)
    assert np.abs(a["out.kernel"] - c["out.kernel"]).max() > 0.01


def test_the_scalers_are_fitted_to_the_training_questions() -> None:
    train = examples(80, 0, shift=5.0)
    train.prompt_features[:, 2] = 4.0  # a constant feature must not cause a division by zero
    sidecar = Sidecar(SidecarConfig(n_features=3, n_prompt_features=4, d_hidden=4), rngs=nnx.Rngs(0))
    fit_scalers(sidecar, train)
    flat = train.features.reshape(-1, 3).astype(float)
    np.testing.assert_allclose(sidecar.feature_scaler.mean[...], flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(sidecar.feature_scaler.scale[...], flat.std(0) + 1e-6, rtol=1e-6)
    np.testing.assert_allclose(sidecar.prompt_scaler.mean[...], train.prompt_features.mean(0), rtol=1e-6)
    assert sidecar.prompt_scaler.scale[...][2] == 1.0


def test_patience_stops_training() -> None:
    train, validate = examples(60, 0), examples(40, 1)
    falling = iter(range(100, 0, -1))
    result = fit_sidecar(train, validate, lambda known, logits: next(falling),
                   SidecarOptions(d_hidden=4, epochs=50, patience=3, batch_size=60))
    assert (result.best_epoch, len(result.scores)) == (1, 4)


def test_three_updates_equal_those_of_torch() -> None:
    """Adam with L2 penalty, pos_weight, mean over questions: three epochs of one batch."""
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    train, validate = examples(40, 0), examples(40, 1)
    known = np.array([1] * 10 + [0] * 30)  # classes out of balance
    train = train._replace(known=known)
    options = SidecarOptions(d_hidden=4, epochs=3, dropout=0.0, batch_size=40, weight_decay=0.1,
                             learning_rate=0.01, balance="weights")
    start = fit_sidecar(train, validate, lambda known, logits: 0.0, SidecarOptions(
        d_hidden=4, epochs=1, dropout=0.0, batch_size=40, learning_rate=1e-30, weight_decay=0.0)).sidecar
    w = {name: torch.tensor(np.asarray(array), dtype=torch.float32)
         for name, array in to_arrays(start).items()}
    trained = {name: array.requires_grad_() for name, array in w.items()
               if name.rsplit(".", 1)[-1] in ("kernel", "bias")}
    x = (torch.tensor(train.features) - w["feature_scaler.mean"]) / w["feature_scaler.scale"]
    g = (torch.tensor(train.prompt_features) - w["prompt_scaler.mean"]) / w["prompt_scaler.scale"]
    optimizer = torch.optim.Adam(trained.values(), lr=0.01, weight_decay=0.1)
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))
    for _ in range(3):
        h, states = torch.zeros(40, 4), []
        for at in range(5):
            driven = x[:, at] @ w["gru.input.kernel"] + w["gru.input.bias"]
            recurrent = h @ w["gru.state.kernel"] + w["gru.state.bias"]
            r, z = torch.sigmoid(driven[:, :8] + recurrent[:, :8]).split(4, dim=1)
            h = (1 - z) * torch.tanh(driven[:, 8:] + r * recurrent[:, 8:]) + z * h
            states.append(h)
        pooled = torch.cat([torch.stack(states).mean(0), h, g], dim=1)
        logits = torch.relu(pooled @ w["hidden.kernel"] + w["hidden.bias"]) @ w["out.kernel"] + w["out.bias"]
        optimizer.zero_grad()
        loss(logits[:, 0], torch.tensor(known, dtype=torch.float32)).backward()
        optimizer.step()
    rising = iter(range(3))
    result = to_arrays(fit_sidecar(train, validate, lambda known, logits: next(rising), options).sidecar)
    for name, array in trained.items():
        np.testing.assert_allclose(result[name], array.detach().numpy(), atol=2e-5, err_msg=name)


def test_invalid_training_data() -> None:
    train, validate = examples(40, 0), examples(40, 1)
    with pytest.raises(ValueError, match="validate: expected known and unknown questions, found one kind"):
        fit_sidecar(train, validate._replace(known=np.ones(40, int)), auroc, SMALL)
    with pytest.raises(ValueError, match="seed 0: after epoch 1 the logits are not finite; a smaller"):
        fit_sidecar(train, validate, auroc, dataclasses.replace(SMALL, learning_rate=1e30))
    train.features[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match="train: a feature is not finite"):
        fit_sidecar(train, validate, auroc, SMALL)
