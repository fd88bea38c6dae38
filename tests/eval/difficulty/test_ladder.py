"""The rungs of the ladder and their comparisons, by the available feature blocks."""

from __future__ import annotations

from tilelli_jax.eval.difficulty import ladder
from tilelli_jax.eval.probes import LADDER

ALL = ("cheap", "nll", "length", "raw", "sae")


def test_rungs_need_all_their_blocks() -> None:
    every = ladder.rungs(ALL)
    assert every == [*LADDER, *ladder.CONTROLS] and len({rung.name for rung in every}) == len(every)
    without_sae = ladder.rungs(["cheap", "nll", "length", "raw"])
    assert [rung for rung in every if "sae" not in rung.blocks] == without_sae != every
    for rung in ladder.rungs(["cheap", "raw"]):  # the blocks of a series
        assert set(rung.blocks) <= {"cheap", "raw"}
    assert {rung.blocks for rung in ladder.rungs(["cheap", "raw"])} >= {("cheap",), ("raw",)}
    assert ladder.rungs([]) == [rung for rung in LADDER if not rung.blocks]


def test_comparisons_are_between_existing_rungs() -> None:
    names = {rung.name: set(rung.blocks) for rung in ladder.rungs(ALL)}
    assert len(set(ladder.COMPARISONS)) == len(ladder.COMPARISONS)
    for a, b in ladder.COMPARISONS:
        assert a in names and b in names and a != b
    # Activations are compared with the control that they are added to.
    for more, less in (("C3_length_raw", "C1_length"), ("C4_length_sae", "C1_length")):
        assert (more, less) in ladder.COMPARISONS and len(names[more] - names[less]) == 1
