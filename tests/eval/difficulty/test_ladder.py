"""The rungs of the study and what is compared, by what blocks there are."""

from __future__ import annotations

from tilelli_jax.eval.difficulty import ladder
from tilelli_jax.eval.probes import LADDER

ALL = ("cheap", "surprise", "length", "raw", "sae")


def test_rungs_are_those_whose_blocks_there_are() -> None:
    every = ladder.rungs(ALL)
    assert every == [*LADDER, *ladder.CONTROLS] and len({rung.name for rung in every}) == len(every)
    without_sae = ladder.rungs(["cheap", "surprise", "length", "raw"])
    assert [rung for rung in every if "sae" not in rung.blocks] == without_sae != every
    for rung in ladder.rungs(["cheap", "raw"]):  # of a series
        assert set(rung.blocks) <= {"cheap", "raw"}
    assert {rung.blocks for rung in ladder.rungs(["cheap", "raw"])} >= {("cheap",), ("raw",)}
    assert ladder.rungs([]) == [rung for rung in LADDER if not rung.blocks]


def test_what_is_compared_is_there() -> None:
    names = {rung.name: set(rung.blocks) for rung in ladder.rungs(ALL)}
    assert len(set(ladder.COMPARISONS)) == len(ladder.COMPARISONS)
    for a, b in ladder.COMPARISONS:
        assert a in names and b in names and a != b
    # What activations add to a control is told against that control.
    for more, less in (("C3_length_raw", "C1_length"), ("C4_length_sae", "C1_length")):
        assert (more, less) in ladder.COMPARISONS and len(names[more] - names[less]) == 1
