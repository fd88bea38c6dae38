"""AdamW and Muon with a learning-rate schedule, gradient clipping and decoupled weight decay."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax
import optax
import optax.contrib

from tilelli_jax.config import Section, setting
from tilelli_jax.parallel.sharding import path_name

# Matrices inside the blocks, which Muon orthogonalises. Adam updates embeddings, routers, convolutions and
# all vectors.
MUON = re.compile(r"blocks\..*(query|key|value|qkv|out|up|down)\.kernel$")
DECAYED = re.compile(r"kernel$")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """The update rule and its schedule."""

    name: Literal["adamw", "muon"] = setting("adamw", "update rule")
    learning_rate: float = setting(3e-4, "peak learning rate", above=0)
    schedule: Literal["cosine", "constant", "wsd"] = setting(
        "cosine", "learning rate after the warm-up: cosine decay, constant, or constant and then linear "
        "decay (wsd: warm-up, stable, decay)")
    warmup_steps: int = setting(
        100, "updates of linear warm-up; a shorter run warms up throughout", min=0)
    zero_first_rate: bool = setting(
        False, "start the warm-up at a learning rate of exactly 0, so that the first update changes nothing")
    final_fraction: float = setting(
        0.1, "last learning rate, as a fraction of the peak (not used by constant)", min=0, max=1)
    decay_fraction: float = setting(0.2, "fraction of all updates in which wsd decays", min=0, max=1)
    b1: float = setting(0.9, "Adam's decay of the first moment", min=0, below=1)
    b2: float = setting(0.95, "Adam's decay of the second moment", min=0, below=1)
    eps: float = setting(1e-8, "Adam's epsilon", above=0)
    momentum: float = setting(0.95, "Muon's momentum", min=0, below=1)
    adam_ratio: float = setting(
        1.0, "learning rate of the parameters that Adam (here NAdam) updates under muon, relative to Muon's",
        above=0)
    weight_decay: float = setting(
        0.1, "decoupled weight decay of kernels; norms, biases, positions, SSM vectors and LSQ scales are "
        "not decayed", min=0)
    clip_norm: float = setting(1.0, "largest global gradient norm; 0: no clipping", min=0)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the update (0 is the first); `steps` is the run's length.

    The last update, `steps - 1`, has the final rate, unless fewer than two updates follow the warm-up.
    """
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    # By default the first rate is above 0: with a rate of exactly 0 the first update would be wasted.
    warm = min(config.warmup_steps, steps)
    warmup = optax.linear_schedule(0.0 if config.zero_first_rate else peak / (warm + 1), peak, max(warm, 1))
    rest = max(steps - warm - 1, 1)  # updates in which the rate falls, after the one at the peak
    match config.schedule:
        case "constant":
            main = optax.constant_schedule(peak)
        case "cosine":
            main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
        case "wsd":
            decay = min(max(round(steps * config.decay_fraction), 1), rest)
            main = optax.linear_schedule(peak, last, decay, transition_begin=rest - decay)
    return optax.join_schedules([warmup, main], [warm]) if warm else main


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Chains gradient clipping, the direction (Adam or Muon), weight decay and the learning rate."""
    if config.name == "muon":
        # Learning rate 1, then scaled by -1: only the direction is used here; decay and schedule are shared.
        # consistent_rms=0.2 matches Adam's update RMS (Liu et al. 2025, arXiv:2502.16982).
        direction = optax.chain(
            optax.contrib.muon(1.0, beta=config.momentum, eps=config.eps, adam_b1=config.b1,
                               adam_b2=config.b2, adam_learning_rate=config.adam_ratio,
                               muon_weight_dimension_numbers=_muon_dimensions, consistent_rms=0.2),
            optax.scale(-1.0))
    else:
        direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip, direction,
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(make_schedule(config, steps)))


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(DECAYED.search(path_name(path))), params)


def _muon_dimensions(params: Any) -> Any:
    """Tells Muon that a stacked kernel's last two axes are the matrix and earlier axes index matrices."""
    def dimensions(path: Any, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if MUON.search(path_name(path)):
            return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
        return None
    return jax.tree_util.tree_map_with_path(dimensions, params)
