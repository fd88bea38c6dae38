"""Top-k attention beside dense attention, beside other exact forms of it, and beside PyTorch.

    python -m bench.topk_attention [--rounds 15] [--batch 8] [--time 256]

Every row is a whole pathway: projections to queries and keys, attention, value kernels, and then
the gradients of all of these with it. In each round every row runs once; a ratio is the median over
the rounds. What is kept lies in memory between forward and backward, inputs included. Where huge
pages can be had, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 makes every JAX row faster.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.measure import (
    arguments,
    in_turn,
    machine,
    milliseconds,
    on_torch_device,
    ratio,
    told,
    torch_wait,
)
from tilelli_jax.nn.topk import top_k_attention
from tilelli_jax.tables import table

D_MODEL = 256
SHAPES = {"atome": (1, 64, 4), "Lite": (8, 48, 16)}  # heads, d_head, k
FIRST = "dense, values first"

Arrays = tuple[Any, ...]  # x, query kernel, key kernel, value kernels, direction of the gradient
Pathway = Callable[..., jax.Array]


def pathways(k: int) -> dict[str, Pathway]:
    return {
        FIRST: functools.partial(masked, causal_mask, values_first),
        "dense, context first": functools.partial(masked, causal_mask, context_first),
        "top-k": functools.partial(ours, k),
        "  the same, k = time": functools.partial(ours, 1 << 30),
        "top-k, mask by lax.top_k": functools.partial(
            masked, functools.partial(sorted_mask, k), values_first
        ),
        "top-k, rows gathered": functools.partial(gathered, k),
    }


def project(x: jax.Array, *kernels: jax.Array) -> list[jax.Array]:
    return [jnp.einsum("btd,dhe->bthe", x, kernel) for kernel in kernels]


def causal_scores(query: jax.Array, key: jax.Array) -> jax.Array:
    scores = jnp.einsum("bthe,bshe->bhts", query, key) * query.shape[-1] ** -0.5
    return jnp.where(jnp.tri(scores.shape[-1], dtype=bool)[None, None], scores, -jnp.inf)


def ours(k: int, x: jax.Array, query_kernel: Any, key_kernel: Any, kernel: Any) -> jax.Array:
    query, key = project(x, query_kernel, key_kernel)
    return top_k_attention(query, key, x, kernel, k)


def masked(
    mask: Callable, mix: Callable, x: jax.Array, query_kernel: Any, key_kernel: Any, kernel: Any
) -> jax.Array:
    scores = causal_scores(*project(x, query_kernel, key_kernel))
    weights = jax.nn.softmax(jnp.where(mask(jax.lax.stop_gradient(scores)), scores, -jnp.inf))
    return mix(weights, x, kernel) / kernel.shape[0]


def causal_mask(scores: jax.Array) -> jax.Array:
    return scores > -jnp.inf


def sorted_mask(k: int, scores: jax.Array) -> jax.Array:
    values, positions = jax.lax.top_k(scores, k)
    least = values.min(-1, keepdims=True)
    last = jnp.where(values == least, positions, -1).max(-1, keepdims=True)
    before = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 3) <= last
    return (scores > least) | ((scores == least) & before)


def values_first(weights: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
    values = jnp.einsum("bsd,hdo->bhso", x, kernel)
    return jnp.einsum("bhts,bhso->bto", weights, values)


def context_first(weights: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
    context = jnp.einsum("bhts,bsd->bthd", weights, x)
    return jnp.einsum("bthd,hdo->bto", context, kernel)


def gathered(k: int, x: jax.Array, query_kernel: Any, key_kernel: Any, kernel: Any) -> jax.Array:
    scores = causal_scores(*project(x, query_kernel, key_kernel))
    _, positions = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
    weights = jax.nn.softmax(jnp.take_along_axis(scores, positions, axis=-1))
    rows = jax.vmap(lambda of_batch, at: of_batch[at])(x, positions)
    context = jnp.einsum("bhtk,bhtkd->bthd", weights, rows)
    return jnp.einsum("bthd,hdo->bto", context, kernel) / kernel.shape[0]


def torch_calls(arrays: Arrays, k: int) -> tuple[Callable, Callable]:
    """The same in eager PyTorch: topk, scatter of what it kept, softmax."""
    import torch

    x, query_kernel, key_kernel, kernel, direction = on_torch_device(
        *(torch.tensor(np.asarray(a)) for a in arrays))
    leaves = [x, query_kernel, key_kernel, kernel]
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)

    def forward() -> Any:
        query, key = (torch.einsum("btd,dhe->bhte", x, w) for w in (query_kernel, key_kernel))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        best, positions = scores.masked_fill(later, -torch.inf).topk(k, dim=-1)
        kept = torch.full_like(scores, -torch.inf).scatter(-1, positions, best)
        values = torch.einsum("bsd,hdo->bhso", x, kernel)
        return (kept.softmax(-1) @ values).mean(1)

    def only_forward() -> None:
        with torch.no_grad():
            forward()
        torch_wait()

    def both() -> None:
        for leaf in leaves:
            leaf.requires_grad_(True)
        torch.autograd.grad(forward(), leaves, direction)
        torch_wait()

    return only_forward, both


def jax_calls(pathway: Pathway, arrays: Arrays) -> tuple[Callable, Callable]:
    inputs = arrays[:-1]
    forward = jax.jit(pathway)
    both = jax.jit(lambda *a: jax.vjp(pathway, *a[:-1])[1](a[-1]))
    return (
        lambda: jax.block_until_ready(forward(*inputs)),
        lambda: jax.block_until_ready(both(*arrays)),
    )


def kept_megabytes(pathway: Pathway, inputs: Arrays) -> float:
    saved = jax.eval_shape(lambda *a: jax.vjp(pathway, *a)[1], *inputs)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(saved)) / 1e6


def compare(name: str, batch: int, length: int, rounds: int, tell: Callable[[str], None]) -> None:
    heads, d_head, k = SHAPES[name]
    rng = np.random.default_rng(0)
    shapes = [(batch, length, D_MODEL), *2 * [(D_MODEL, heads, d_head)], (heads, D_MODEL, D_MODEL)]
    arrays = tuple(jnp.asarray(rng.normal(size=s) * 0.1, jnp.float32) for s in [*shapes, shapes[0]])
    in_jax = pathways(k)
    calls = {row: jax_calls(pathway, arrays) for row, pathway in in_jax.items()}
    if importlib.util.find_spec("torch"):
        calls["top-k, PyTorch eager"] = torch_calls(arrays, k)
    passes = [in_turn({row: pair[i] for row, pair in calls.items()}, rounds) for i in (0, 1)]
    rows: list[tuple[str, ...]] = [
        (name, "forward, ms", "of the first", "and backward, ms", "of the first", "kept, MB")
    ]
    for row in calls:
        cells = [
            cell
            for seconds in passes
            for cell in (milliseconds(seconds[row]), f"{ratio(seconds[row], seconds[FIRST]):.2f}")
        ]
        kept = f"{kept_megabytes(in_jax[row], arrays[:-1]):.0f}" if row in in_jax else ""
        rows.append((row, *cells, kept))
    tell(f"\nbatch {batch}, time {length}, {heads} × {d_head}, k {k}, d_model {D_MODEL}")
    tell(table(rows))


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--time", type=int, default=256)
    options = parser.parse_args()
    with told(options.out) as tell:
        tell(f"{machine()}, GLIBC_TUNABLES {os.environ.get('GLIBC_TUNABLES', 'not set')}")
        for name in SHAPES:
            compare(name, options.batch, options.time, options.rounds, tell)


if __name__ == "__main__":
    main()
