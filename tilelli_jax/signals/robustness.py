"""Perturbation robustness (signal C of Recall): how noise in the middle layers changes the prediction.

The network processes a prompt once without noise and k times with Gaussian noise added to the residual
stream: at every position, before the first layer of the middle band, N(0, (σ · RMS of the stream there)²).
The signal is the mean divergence KL(without noise ‖ with noise) of the next token's distribution, in nats;
0 means that the noise has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.nn.hooks import Tap
from tilelli_jax.parallel.sharding import Mesh, replicated
from tilelli_jax.signals.batching import batches, max_time, on_devices, padded_ids
from tilelli_jax.signals.crystallisation import band
from tilelli_jax.signals.lens import CHUNK, logit_lens_from
from tilelli_jax.signals.prompts import check_lengths


class Robustness:
    """Measures the robustness of one network; the compiled program is reused between calls.

    Args:
        sigma: standard deviation of the noise relative to the RMS of the stream.
        k: number of noisy passes.
        layer: layer before which the noise is added; by default the first of the middle band.
        seed: of the noise. The noise of a prompt depends on its number, not on its batch.
        mesh: devices that share each batch; batch_size is rounded up to a multiple of their number.
    """

    def __init__(self, model: Any, *, sigma: float = 0.1, k: int = 4, layer: int | None = None, seed: int = 0,
                 batch_size: int = 16, chunk: int = CHUNK, mesh: Mesh | None = None) -> None:
        if sigma < 0 or k < 1:
            raise ValueError(f"sigma and k: expected sigma ≥ 0 and k ≥ 1, found {sigma} and {k}")
        noise_layer = band(model.config.n_layers)[0] if layer is None else layer
        if not 0 <= noise_layer < model.config.n_layers:
            raise ValueError(f"layer: expected 0 to {model.config.n_layers - 1}, found {noise_layer}")
        self.batch_size, self.mesh = batch_size, mesh
        self.key, self.max_tokens = jax.random.key(seed), max_time(model)
        graph, self._params = nnx.split(model)

        def read(params: Any, ids: jax.Array, last: jax.Array, keys: jax.Array,
                 final: jax.Array | None) -> jax.Array:
            model = nnx.merge(graph, params)

            def stream(keys: jax.Array | None) -> jax.Array:
                def noisy(value: jax.Array, at_layer: int | None) -> jax.Array:
                    if at_layer != noise_layer or keys is None:
                        return value
                    rms = jnp.sqrt(jnp.mean(jnp.square(value.astype(jnp.float32)), -1, keepdims=True))
                    noise = jax.vmap(lambda key: jax.random.normal(key, value.shape[1:]))(keys)
                    return value + (sigma * rms * noise).astype(value.dtype)
                tap = Tap(record=("resid_post",), positions=last[:, None], edit={"resid_pre": noisy})
                return model.tapped(ids, tap)[1]["resid_post"][-1, :, 0]
            # Sequential passes need the memory of one pass.
            noised = jax.lax.map(lambda i: stream(jax.vmap(jax.random.fold_in, (0, None))(keys, i)),
                                 jnp.arange(k))
            clean_rows = stream(None) if final is None else final.astype(noised.dtype)
            rows = jnp.concatenate([clean_rows, noised.reshape(-1, noised.shape[-1])])
            batch = len(ids)
            clean = jnp.concatenate([rows[:batch]] * k)  # one copy for each noisy pass
            _, divergence = logit_lens_from(
                model.unembedding(), jnp.concatenate([clean, rows[batch:]]),
                (jnp.arange(2 * k * batch) + k * batch) % (2 * k * batch), chunk=chunk)
            return jnp.mean(divergence[:k * batch].reshape(k, batch), axis=0)
        self._read = jax.jit(read, out_shardings=None if mesh is None else replicated(mesh))

    def __call__(self, prompts: Sequence[Sequence[int]], stream_ids: Sequence[int] | None = None,
                 final: np.ndarray | None = None) -> np.ndarray:
        """Token ids of each prompt → mean divergence, f32 `[prompts]`, in nats.

        Args:
            stream_ids: index of each prompt in the random stream; by default 0, 1, ….
            final: the residual stream after the last layer at each prompt's last position, f32 `[prompts,
                d_model]`, where it is known (`PromptOutputs.final[-1]`); it saves the pass without noise.

        Raises:
            ValueError: a prompt is empty or longer than the network's context.
        """
        check_lengths(prompts, self.max_tokens)
        ids = np.arange(len(prompts)) if stream_ids is None else np.asarray(stream_ids)
        divergences = np.zeros(len(prompts), np.float32)
        for batch in batches([len(prompt) for prompt in prompts], self.batch_size, limit=self.max_tokens,
                             mesh=self.mesh):
            rows = [prompts[i] for i in batch.filled]
            keys = jax.vmap(lambda n: jax.random.fold_in(self.key, n))(
                jnp.asarray(ids[batch.filled], jnp.uint32))
            arrays = padded_ids(rows, batch.time), np.array([len(prompt) - 1 for prompt in rows], np.int32)
            known = None if final is None else on_devices((final[batch.filled],), self.mesh)[0]
            values = self._read(self._params, *on_devices(arrays, self.mesh), keys, known)
            divergences[batch.indices] = np.asarray(values)[:len(batch.indices)]
        return divergences
