"""The uncertainty signals of a prompt: name, direction, unit and meaning of each.

`signals.uncertainty` computes them. Thresholds, studies and claims take names and directions from here.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

HEAD = "abstain_p"  # the signal of the abstain head
BLOCK = "router_entropy_b"  # prefix of the router entropy of one block; the block's number follows
DRIFT = "drift"  # needs a second network


class Signal(NamedTuple):
    """An uncertainty signal.

    Attributes:
        direction: 1 if the signal is expected to be higher where the network does not know the answer, −1 if
            lower, 0 if there is no expectation.
        unit: unit of the numbers; "" if they have none.
        meaning: definition, one line.
        hook: the hook that a network must have; "" for any network.
        feature: the Recall feature (`signals.crystallisation`) of the same value; "" for others.
    """

    direction: Literal[-1, 0, 1]
    unit: str
    meaning: str
    hook: str = ""
    feature: str = ""


# Tilelli's study gives no direction for router_entropy_var and the logit lens. A network in doubt is
# expected to vary more between blocks and positions, and to settle on its output in later layers.
SIGNALS: dict[str, Signal] = {
    "max_softmax_last": Signal(
        -1, "probability", "largest next-token probability at the prompt's last position"),
    "max_softmax_mean": Signal(
        -1, "probability", "largest next-token probability, mean over the positions of the prompt"),
    "router_conf": Signal(-1, "", "1 − router_entropy", "router"),
    "router_entropy": Signal(
        1, "", "entropy of the router's weights over its maximum, 0 to 1, mean over blocks and positions",
        "router"),
    "router_entropy_var": Signal(
        1, "", "variance of the router's entropy over blocks and positions", "router"),
    HEAD: Signal(
        1, "probability", "the abstain head's probability that the prompt has no answer", "abstain"),
    DRIFT: Signal(
        0, "nats", "KL divergence of the routing from another network's, mean over blocks and positions",
        "router"),
    "lens_entropy": Signal(
        1, "nats", "entropy of the logit lens at the last position, mean over the middle layers",
        feature="a_band_mean_entropy"),
    "lens_settling": Signal(
        1, "", "depth from which the logit lens keeps its most likely token, 0 to 1",
        feature="a_settling_layer_norm"),
    "lens_margin": Signal(
        -1, "logits", "largest margin of the logit lens's most likely token over the layers",
        feature="a_max_margin")}

LENS = {name: signal.feature for name, signal in SIGNALS.items() if signal.feature}  # name → Recall feature
ROUTER = tuple(name for name, signal in SIGNALS.items() if signal.hook == "router" and name != DRIFT)


def direction(name: str) -> int:
    """The direction of a signal, also of a single block's router entropy; 0 if the name is not a signal."""
    if name.startswith(BLOCK):
        name = "router_entropy"
    return SIGNALS[name].direction if name in SIGNALS else 0


def signal_names(model: Any) -> tuple[str, ...]:
    """The signals of a network, in the order of SIGNALS, without drift, which needs a second network.

    The router entropy of each block follows the other signals of the router and the head.
    """
    found = [name for name, signal in SIGNALS.items()
             if name != DRIFT and (not signal.hook or signal.hook in model.hooks)]
    blocks = [f"{BLOCK}{i}" for i in range(model.config.n_layers)] if "router" in model.hooks else []
    first_lens = found.index(next(iter(LENS)))
    return (*found[:first_lens], *blocks, *found[first_lens:])


def describe(name: str) -> str:
    """A signal in one line: name, meaning, unit, and where it is expected to be higher."""
    signal = SIGNALS[name]
    side = {1: "; higher if not known", -1: "; lower if not known", 0: ""}
    return f"{name}: {signal.meaning}{f' ({signal.unit})' if signal.unit else ''}{side[signal.direction]}"
