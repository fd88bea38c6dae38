"""Top-k attention compared with dense attention, other exact implementations, and PyTorch.

    python -m bench.topk_attention [--rounds 15] [--batch 8] [--time 256]

Every row is a complete pathway (projections to queries and keys, attention, value kernels), timed without and
with its gradients. In each round every row runs once; a ratio is the median over the rounds. "saved, MB" is
the memory kept between forward and backward, inputs included. If the system has huge pages,
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 makes every JAX row faster.
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
    tee,
    torch_synchronize,
)
from tilelli_jax.cli.tables import table
from tilelli_jax.nn.topk import top_k_attention

D_MODEL = 256
SHAPES = {"atome": (1, 64, 4), "Lite": (8, 48, 16)}  # heads, d_head, k
REFERENCE = "dense, values first"

Arrays = tuple[Any, ...]  # x, query kernel, key kernel, value kernels, direction of the gradient
Pathway = Callable[..., jax.Array]


def pathways(k: int) -> dict[str, Pathway]:
    return {
        REFERENCE: functools.partial(masked, causal_mask, values_first),
        "dense, context first": functools.partial(masked, causal_mask, context_first),
        "top-k": functools.partial(our_top_k, k),
        "  the same, k = time": functools.partial(our_top_k, 1 << 30),
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


def our_top_k(k: int, x: jax.Array, query_kernel: Any, key_kernel: Any, kernel: Any) -> jax.Array:
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
    threshold = values.min(-1, keepdims=True)
    last_index = jnp.where(values == threshold, positions, -1).max(-1, keepdims=True)
    earlier = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 3) <= last_index
    return (scores > threshold) | ((scores == threshold) & earlier)


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
    rows = jax.vmap(lambda batch_rows, indices: batch_rows[indices])(x, positions)
    context = jnp.einsum("bhtk,bhtkd->bthd", weights, rows)
    return jnp.einsum("bthd,hdo->bto", context, kernel) / kernel.shape[0]


def torch_calls(arrays: Arrays, k: int) -> tuple[Callable, Callable]:
    """The same in eager PyTorch: topk, scatter of the selected scores, softmax."""
    import torch

    x, query_kernel, key_kernel, kernel, direction = on_torch_device(
        *(torch.tensor(np.asarray(a)) for a in arrays))
    leaves = [x, query_kernel, key_kernel, kernel]
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)

    def forward() -> Any:
        query, key = (torch.einsum("btd,dhe->bhte", x, w) for w in (query_kernel, key_kernel))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        top_scores, positions = scores.masked_fill(future, -torch.inf).topk(k, dim=-1)
        selected = torch.full_like(scores, -torch.inf).scatter(-1, positions, top_scores)
        values = torch.einsum("bsd,hdo->bhso", x, kernel)
        return (selected.softmax(-1) @ values).mean(1)

    def only_forward() -> None:
        with torch.no_grad():
            forward()
        torch_synchronize()

    def forward_backward() -> None:
        for leaf in leaves:
            leaf.requires_grad_(True)
        torch.autograd.grad(forward(), leaves, direction)
        torch_synchronize()

    return only_forward, forward_backward


def jax_calls(pathway: Pathway, arrays: Arrays) -> tuple[Callable, Callable]:
    inputs = arrays[:-1]
    forward = jax.jit(pathway)
    forward_backward = jax.jit(lambda *a: jax.vjp(pathway, *a[:-1])[1](a[-1]))
    return (
        lambda: jax.block_until_ready(forward(*inputs)),
        lambda: jax.block_until_ready(forward_backward(*arrays)),
    )


def saved_megabytes(pathway: Pathway, inputs: Arrays) -> float:
    saved = jax.eval_shape(lambda *a: jax.vjp(pathway, *a)[1], *inputs)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(saved)) / 1e6


def compare(name: str, batch: int, length: int, rounds: int, print_line: Callable[[str], None]) -> None:
    heads, d_head, k = SHAPES[name]
    rng = np.random.default_rng(0)
    shapes = [(batch, length, D_MODEL), *2 * [(D_MODEL, heads, d_head)], (heads, D_MODEL, D_MODEL)]
    arrays = tuple(jnp.asarray(rng.normal(size=s) * 0.1, jnp.float32) for s in [*shapes, shapes[0]])
    jax_pathways = pathways(k)
    calls = {row: jax_calls(pathway, arrays) for row, pathway in jax_pathways.items()}
    if importlib.util.find_spec("torch"):
        calls["top-k, PyTorch eager"] = torch_calls(arrays, k)
    passes = [in_turn({row: pair[i] for row, pair in calls.items()}, rounds) for i in (0, 1)]
    rows: list[tuple[str, ...]] = [
        (name, "forward, ms", "× dense", "forward + backward, ms", "× dense", "saved, MB")
    ]
    for row in calls:
        cells = [
            cell
            for seconds in passes
            for cell in (milliseconds(seconds[row]), f"{ratio(seconds[row], seconds[REFERENCE]):.2f}")
        ]
        saved = f"{saved_megabytes(jax_pathways[row], arrays[:-1]):.0f}" if row in jax_pathways else ""
        rows.append((row, *cells, saved))
    print_line(f"\nbatch {batch}, time {length}, {heads} × {d_head}, k {k}, d_model {D_MODEL}")
    print_line(table(rows))


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--time", type=int, default=256)
    options = parser.parse_args()
    with tee(options.out) as print_line:
        print_line(f"{machine()}, GLIBC_TUNABLES {os.environ.get('GLIBC_TUNABLES', 'not set')}")
        for name in SHAPES:
            compare(name, options.batch, options.time, options.rounds, print_line)


if __name__ == "__main__":
    main()
