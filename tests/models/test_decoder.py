"""Invalid inputs of a decoder raise errors."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference_impl.random_weights import random_network
from tilelli_jax.models import VanillaConfig
from tilelli_jax.models.decoder import Decoder


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_network(VanillaConfig(vocab_size=20, d_model=8, n_layers=1, max_seq_len=5, n_heads=2,
                                        dense_expand=1), 0)[0]


@pytest.mark.parametrize(("ids", "message"), [
    (np.zeros(3, np.int32), r"ids: expected integers \[batch, time\], found int32 \[3\]"),
    (np.zeros((1, 3), np.float32), r"ids: expected integers \[batch, time\], found float32 \[1, 3\]"),
    (np.array([[0, 20]]), "ids: expected 0 to 19, found 20"),
    (np.array([[-1, 19]]), "ids: expected 0 to 19, found -1"),
    (np.zeros((1, 6), np.int32), "time 6 is longer than max_seq_len 5"),
])
def test_invalid_ids_raise(model: Decoder, ids: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(ids)


def test_lists_and_uint8_ids_are_accepted(model: Decoder) -> None:
    expected = model(jnp.array([[3, 1, 19]]))
    assert expected.shape == (1, 3, 20) and expected.dtype == jnp.float32
    assert (model([[3, 1, 19]]) == expected).all()
    assert (model(jnp.array([[3, 1, 19]], jnp.uint8)) == expected).all()
