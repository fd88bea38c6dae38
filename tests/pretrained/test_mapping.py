"""Maps of names: both directions undo one another, and nothing goes missing in silence."""

from __future__ import annotations

import numpy as np
import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import in_memory
from tilelli_jax.models.t5 import T5Config
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.gemma3 import GEMMA3
from tilelli_jax.pretrained.gemma4 import GEMMA4
from tilelli_jax.pretrained.gpt_neox import GPT_NEOX
from tilelli_jax.pretrained.llama import LLAMA
from tilelli_jax.pretrained.mapping import Theirs, transposed
from tilelli_jax.pretrained.t5 import T5

NAMES = {
    "a": Theirs("a.weight"), "b.{i}.kernel": transposed("layers.{i}.b.weight"),
    "c.{i}.kernel": Theirs("layers.{i}.c.weight", "taps"),
    "q.{i}.kernel": Theirs("layers.{i}.q.weight", "fused heads"),
    "h.{i}.kernel": transposed("layers.{i}.heads.{h}.weight"), "e.kernel": transposed("experts")}
SHAPES = {"a": (3,), "b.0.kernel": (2, 5), "b.11.kernel": (2, 5), "c.0.kernel": (4, 6),
          "q.0.kernel": (3, 4, 2), "h.0.kernel": (3, 4, 2), "h.1.kernel": (1, 4, 2), "e.kernel": (2, 3, 4)}


def test_both_directions_undo_one_another() -> None:
    rng = np.random.default_rng(0)
    ours = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    links = mapping.link(NAMES, SHAPES)
    theirs = mapping.to_theirs(links, {name: in_memory(array) for name, array in ours.items()})
    assert {name: tensor.shape for name, tensor in theirs.items()} == {
        "a.weight": (3,), "layers.0.b.weight": (5, 2), "layers.11.b.weight": (5, 2),
        "layers.0.c.weight": (6, 1, 4), "layers.0.q.weight": (6, 4), "experts": (2, 4, 3),
        "layers.0.heads.0.weight": (2, 4), "layers.0.heads.1.weight": (2, 4),
        "layers.0.heads.2.weight": (2, 4), "layers.1.heads.0.weight": (2, 4)}
    assert all(tensor.read().shape == tensor.shape for tensor in theirs.values())
    mapping.check(links, {name: tensor.shape for name, tensor in theirs.items()}, {}, "here")
    for name, tensor in mapping.to_ours(links, theirs).items():
        np.testing.assert_array_equal(tensor.read(), ours[name])


def test_what_the_layouts_mean() -> None:
    """y = W x as PyTorch stores W is y = x K as we do; a head is a run of rows of a fused one."""
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((6, 4)), rng.standard_normal(4)
    kernel = mapping.LAYOUTS["transposed"].ours(weight, (4, 6))
    np.testing.assert_allclose(x @ kernel, weight @ x)
    heads = mapping.LAYOUTS["fused heads"].ours(weight, (3, 4, 2))
    np.testing.assert_allclose(np.concatenate([x @ head for head in heads]), weight @ x)
    taps = mapping.LAYOUTS["taps"].ours(rng.standard_normal((6, 1, 5)), (5, 6))
    assert taps.shape == (5, 6)
    numbers = np.arange(30.0).reshape(6, 1, 5)
    assert mapping.LAYOUTS["taps"].ours(numbers, (5, 6))[4, 2] == numbers[2, 0, 4]


def test_everything_that_does_not_fit_is_listed() -> None:
    links = mapping.link(NAMES, {"a": (3,), "h.0.kernel": (2, 4, 2)})
    found = {"a.weight": (4,), "layers.0.heads.0.weight": (2, 4), "more": (1,), "old.mask": (9, 9)}
    with pytest.raises(InputError) as raised:
        mapping.check(links, found, {r"\.mask$": "not needed"}, "file.pt")
    assert str(raised.value) == (
        "file.pt: tensors do not fit the configuration; missing: layers.0.heads.1.weight; not known: more; "
        "of another shape: a.weight (4,) instead of (3,)")
    with pytest.raises(InputError, match=r"expected a tensor name .* found none for z\.3\.kernel"):
        mapping.link(NAMES, {"z.3.kernel": (1,)})


@pytest.mark.parametrize(("family", "config"), [
    (GPT_NEOX, None), (LLAMA, None), (GEMMA3, None), (GEMMA4, None), (T5, T5Config()),
    (T5, T5Config(gated=True))])
def test_no_name_stands_twice(family, config) -> None:
    names = family.names(config)
    theirs = [place.name for place in names.values()]
    assert len(set(theirs)) == len(theirs)
    assert all(("{i}" in ours) == ("{i}" in place.name) for ours, place in names.items())
