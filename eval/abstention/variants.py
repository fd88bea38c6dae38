"""The variants of the study: the published ones and our controls, their start, data and losses."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["trained", "spliced", "fitted"]
Data = Literal["chat", "answerability", "answers", "plain_text"]


class Variant(NamedTuple):
    """One network of the study.

    Attributes:
        kind: trained: fine-tuned from the start; spliced: the start with another network's abstain head;
            fitted: a head fitted to the activations of the unchanged start.
        start: the variant from which it starts; "base" is the network pretrained on text, without chat.
        description: for reports.
        trains: groups of parameters to train (`tilelli_jax.training.groups`).
        data: the training data. chat: questions that the response answers or refuses; answerability:
            likewise, but no loss on refusals; answers: chat in which some answers are gibberish or belong to
            another question; plain_text: text without turns, and gibberish.
        abstain_position: see `data.chat_pairs.ChatConfig`.
        cross_entropy_weight, abstain_weight, router_entropy_weight, router_kl_weight: weights of the losses.
        published: the published result; empty for our controls.
    """

    kind: Kind
    start: str
    description: str
    trains: tuple[str, ...] = ()
    data: Data = "answerability"
    abstain_position: Literal["prompt", "pair"] = "prompt"
    cross_entropy_weight: float = 0.0
    abstain_weight: float = 0.0
    router_entropy_weight: float = 0.0
    router_kl_weight: float = 0.0
    published: str = ""

    @property
    def has_head(self) -> bool:
        """Whether the variant has an abstain head."""
        return self.abstain_weight > 0 or self.kind != "trained"

    @property
    def needs_router(self) -> bool:
        """Whether the variant requires a network with a router."""
        return "router" in self.trains or self.router_entropy_weight > 0 or self.router_kl_weight > 0

    @property
    def preserves_generation(self) -> bool:
        """Whether it leaves every parameter that affects generation unchanged."""
        return self.kind != "trained" or self.trains == ("abstain",)


BASE, CHAT = "base", "v4"
_JOINT = {"kind": "trained", "start": CHAT, "trains": ("router", "abstain"), "cross_entropy_weight": 1.0,
          "abstain_weight": 1.0}
VARIANTS: dict[str, Variant] = {
    CHAT: Variant("trained", BASE, "base fine-tuned on chat, all parameters", ("everything",), "chat",
                  cross_entropy_weight=1.0, published="cross-regime AUROC of every signal 0.51 to 0.55"),
    "v5": Variant("trained", CHAT, "router only; plain text against gibberish", ("router",), "plain_text",
                  router_entropy_weight=1.0, published="chat destroyed"),
    "v6": Variant("trained", CHAT, "router only; chat against chat with wrong answers", ("router",),
                  "answers", "pair", cross_entropy_weight=1.0, router_entropy_weight=1.0,
                  published="chat survives; detects form, not meaning"),
    "v7": Variant(**_JOINT, description="router and abstain head, router_entropy_weight 20",  # type: ignore[arg-type]
                  router_entropy_weight=20.0, published="abstain_p 0.76, gibberish 93 %, garbled"),
    "v8a": Variant(**_JOINT, description="router and abstain head, router_entropy_weight 5",  # type: ignore[arg-type]
                   router_entropy_weight=5.0, published="abstain_p 0.80, garbled"),
    "v8b": Variant(**_JOINT, description="router and abstain head, router_entropy_weight 0",  # type: ignore[arg-type]
                   published="abstain_p 0.85, gibberish 100 %, garbled"),
    "splice": Variant("spliced", CHAT, "v4 with the abstain head of v7",
                      published="abstain_p 0.54, 27 % false positives"),
    "v9": Variant("trained", CHAT, "abstain head only, all else frozen", ("abstain",), abstain_weight=1.0,
                  published="predicted, not run: AUROC stays high, chat stays coherent"),
    "router-kl": Variant(**_JOINT, description="as v8b, with a KL penalty towards v4's routing",  # type: ignore[arg-type]
                      router_kl_weight=1.0),
    "mean-pool-head": Variant("fitted", CHAT, "head on the mean over the prompt, network frozen"),
    "pca-head": Variant("fitted", CHAT, "head on a few principal directions of the last position, network "
                                        "frozen"),
}
SPLICED_FROM = "v7"


def dependencies(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the named variants and those that they start from, in the order of VARIANTS."""
    needed = set(names)
    if "splice" in needed:
        needed.add(SPLICED_FROM)
    needed |= {VARIANTS[name].start for name in needed} - {BASE}
    return tuple(name for name in VARIANTS if name in needed)
