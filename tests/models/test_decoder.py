"""What a decoder refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tilelli_jax.models import VanillaConfig
from tilelli_jax.store import build

MODEL = build(VanillaConfig(vocab_size=20, d_model=8, n_layers=1, max_seq_len=5, n_heads=2, dense_expand=1))


@pytest.mark.parametrize(("ids", "says"), [
    (jnp.zeros(3, jnp.int32), r"ids: expected whole numbers \[batch, time\], found int32 \[3\]"),
    (jnp.zeros((1, 3)), r"ids: expected whole numbers \[batch, time\], found float32 \[1, 3\]"),
    (jnp.array([[0, 20]]), "ids: expected 0 to 19, found 20"),
    (jnp.array([[-1, 19]]), "ids: expected 0 to 19, found -1"),
    (jnp.zeros((1, 6), jnp.int32), "time 6 is longer than max_seq_len 5"),
])
def test_ids_that_are_none(ids: jax.Array, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MODEL(ids)


def test_lists_and_bytes_will_do() -> None:
    expected = MODEL(jnp.array([[3, 1, 19]]))
    assert expected.shape == (1, 3, 20) and expected.dtype == jnp.float32
    assert (MODEL([[3, 1, 19]]) == expected).all()
    assert (MODEL(jnp.array([[3, 1, 19]], jnp.uint8)) == expected).all()
