"""What the study trains, from which network and on what: the published variants, and our controls."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["trained", "spliced", "fitted"]
Data = Literal["chat", "semantic", "answers", "bare"]


class Variant(NamedTuple):
    """One network of the study.

    Attributes:
        kind: trained from another one; a head spliced onto it; or a head fitted to what it says, the network
            itself as it is.
        start: the variant that it begins from; "base" is the network that has read, and not chatted.
        trains: groups of parameters (`tilelli_jax.training.groups`).
        data: what it learns from. chat: questions, answered and declined; semantic: likewise, but the
            declined are not imitated; answers: chat with answers that are gibberish or another's; bare: text
            without turns, and gibberish.
        abstain_position: see `data.chat_pairs.ChatConfig`.
        cross_entropy_weight, abstain_weight, router_entropy_weight, router_kl_weight: of the losses.
        what: in words.
        published: what its authors report; empty for ours.
    """

    kind: Kind
    start: str
    what: str
    trains: tuple[str, ...] = ()
    data: Data = "semantic"
    abstain_position: Literal["prompt", "pair"] = "prompt"
    cross_entropy_weight: float = 0.0
    abstain_weight: float = 0.0
    router_entropy_weight: float = 0.0
    router_kl_weight: float = 0.0
    published: str = ""

    @property
    def has_head(self) -> bool:
        """Whether there is an abstention to be heard."""
        return self.abstain_weight > 0 or self.kind != "trained"

    @property
    def needs_router(self) -> bool:
        """Whether a network without a router cannot be this."""
        return "router" in self.trains or self.router_entropy_weight > 0 or self.router_kl_weight > 0

    @property
    def generates_as_before(self) -> bool:
        """Whether nothing that has part in generation is changed."""
        return self.kind != "trained" or self.trains == ("abstain",)


BASE, CHAT = "base", "v4"
_JOINT = {"kind": "trained", "start": CHAT, "trains": ("router", "abstain"), "cross_entropy_weight": 1.0,
          "abstain_weight": 1.0}
VARIANTS: dict[str, Variant] = {
    CHAT: Variant("trained", BASE, "fine-tuned on chat, all of it", ("everything",), "chat",
                  cross_entropy_weight=1.0, published="cross-regime AUROC of every signal 0.51 to 0.55"),
    "v5": Variant("trained", CHAT, "router alone; bare text against gibberish", ("router",), "bare",
                  router_entropy_weight=1.0, published="chat destroyed"),
    "v6": Variant("trained", CHAT, "router alone; chat against chat with wrong answers", ("router",),
                  "answers", "pair", cross_entropy_weight=1.0, router_entropy_weight=1.0,
                  published="chat survives; sees form, not meaning"),
    "v7": Variant(**_JOINT, what="router and abstain head, metacognition 20",  # type: ignore[arg-type]
                  router_entropy_weight=20.0, published="abstain_p 0.76, gibberish 93 %, garbled"),
    "v8a": Variant(**_JOINT, what="router and abstain head, metacognition 5",  # type: ignore[arg-type]
                   router_entropy_weight=5.0, published="abstain_p 0.80, garbled"),
    "v8b": Variant(**_JOINT, what="router and abstain head, no metacognition",  # type: ignore[arg-type]
                   published="abstain_p 0.85, gibberish 100 %, garbled"),
    "splice": Variant("spliced", CHAT, "the abstain head of v7 on v4",
                      published="abstain_p 0.54, 27 % false positives"),
    "v9": Variant("trained", CHAT, "abstain head alone, all else frozen", ("abstain",), abstain_weight=1.0,
                  published="predicted, never run: AUROC stays high, chat stays coherent"),
    "tether": Variant(**_JOINT, what="as v8b, the routing tied to that of v4",  # type: ignore[arg-type]
                      router_kl_weight=1.0),
    "pooled": Variant("fitted", CHAT, "a head on the mean over the prompt, all frozen"),
    "low-rank": Variant("fitted", CHAT, "a head of few directions of the last position, all frozen"),
}
SPLICED_FROM = "v7"


def dependencies(names: tuple[str, ...]) -> tuple[str, ...]:
    """The variants named and those that they begin from, in the order of VARIANTS."""
    wanted = set(names)
    if "splice" in wanted:
        wanted.add(SPLICED_FROM)
    wanted |= {VARIANTS[name].start for name in wanted} - {BASE}
    return tuple(name for name in VARIANTS if name in wanted)
