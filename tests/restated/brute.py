"""The networks and their parts as loops over float64 numbers: slow, and hard to get wrong.

Arrays have the library's names and layouts: kernels (in, out), used as x @ K. A sequence is
[time, width]; only `forward` takes a batch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray
QUANTIZED = ("conv", "attention", "dense")


def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal_conv(x: Array, kernel: Array, bias: Array | float = 0.0) -> Array:
    """The last of the kernel's taps [taps, width] meets the current position."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for tap in range(len(kernel)):
            at = t - (len(kernel) - 1 - tap)
            if at >= 0:
                y[t] += kernel[tap] * x[at]
    return y + bias


def state_space(x: Array, a_raw: Array, b: Array, c: Array) -> Array:
    """The recurrence h_t = a h_{t-1} + b x_t, y_t = c h_t."""
    h, y = np.zeros(x.shape[1]), np.zeros_like(x)
    for t in range(len(x)):
        h = np.tanh(a_raw) * h + b * x[t]
        y[t] = c * h
    return y


def state_space_kernel(a_raw: Array, b: Array, c: Array, time: int) -> Array:
    """The same as a causal convolution: its kernel [time, width], the last tap for the present."""
    return np.stack([c * np.tanh(a_raw) ** (time - 1 - tap) * b for tap in range(time)])


def top_k_attention(q: Array, k: Array, v: Array, top_k: int) -> Array:
    """One head; q, k [time, d_head], v [time, any]. Of equal scores the earliest are kept."""
    y = np.zeros_like(v)
    for t in range(len(q)):
        scores = [float(q[t] @ k[s]) / math.sqrt(q.shape[1]) for s in range(t + 1)]
        kept = sorted(range(t + 1), key=lambda s: (-scores[s], s))[:top_k]
        largest = max(scores)
        weights = {s: math.exp(scores[s] - largest) for s in kept}
        for s in kept:
            y[t] += weights[s] / sum(weights.values()) * v[s]
    return y


def level(ratio: float, powers: bool) -> float:
    """The level that w / scale is rounded to."""
    if not powers:
        return float(min(max(round(ratio), -1), 1))  # Python, too, rounds half to even
    size = sum(rise for bound, rise in ((0.5, 1), (2, 2), (6, 6)) if abs(ratio) > bound)
    return math.copysign(size, ratio)


def quantize(kernel: Array, kind: str, alpha: Array | None = None,
             rotation: Array | None = None) -> Array:
    """A kernel [..., in, out] as the forward pass sees it, every number by itself."""
    if kind == "none":
        return kernel
    if kernel.ndim > 2:
        return np.stack([quantize(part, kind, None if alpha is None else alpha[i], rotation)
                         for i, part in enumerate(kernel)])
    if rotation is not None:
        return rotation @ quantize(rotation.T @ kernel, "ternary")
    result = np.zeros_like(kernel)
    for column in range(kernel.shape[1]):
        measured = kernel[:, column] if kind.endswith("_row") else kernel
        scale = max(np.abs(measured).mean(), 1e-5) if alpha is None else float(alpha)
        for row in range(kernel.shape[0]):
            result[row, column] = scale * level(kernel[row, column] / scale, "power3" in kind)
    return result


def sylvester(size: int) -> Array:
    """Entry (i, j) is the sign of the parity of i & j, over √size."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs) / math.sqrt(size)


def forward(cfg: dict[str, Any], arrays: dict[str, Array], ids: Array) -> Array:
    """The network of that configuration: integers [batch, time] -> logits [batch, time, vocab]."""
    arrays = {name: value.astype(np.float64) for name, value in arrays.items()}
    return np.stack([_sequence(cfg, arrays, row) for row in ids])


def _sequence(cfg: dict[str, Any], arrays: dict[str, Array], ids: Array) -> Array:
    # An entry of the table is a row, and a row's scale is that of an output feature: turn it.
    table = _kernel(cfg, {**arrays, "embed.kernel": arrays["embed.kernel"].T}, "embed", "embed").T
    x = np.stack([table[i] for i in ids])
    if cfg["positions"] == "learned":
        x = x + arrays["positions.table"][: len(ids)]
    block = transformer_block if cfg["family"] == "vanilla" else routed_block
    for n in range(cfg["n_layers"]):
        x = block(cfg, arrays, f"blocks.{n}", x)
    x = _norm(arrays, "final_norm", x)
    return x @ (table.T if cfg["tie_embeddings"] else _kernel(cfg, arrays, "unembed", "unembed"))


def routed_block(cfg: dict[str, Any], arrays: dict[str, Array], at: str, x: Array) -> Array:
    h = _norm(arrays, f"{at}.norm", x)
    logits = h @ _kernel(cfg, arrays, f"{at}.router", "router")
    shares = softmax(logits + arrays.get(f"{at}.router.bias", 0.0))
    mix, i = np.zeros_like(x), 0
    for bank in range(cfg["n_banks"]):
        for kind in cfg["pathways"]:
            name = f"{at}.{kind}_{bank}" if bank else f"{at}.{kind}"
            own = kind == "dense" and cfg["second_norm"] == "dense"
            y = _pathway(cfg, arrays, name, kind, _norm(arrays, f"{at}.norm2", x) if own else h)
            mix, i = mix + shares[:, i : i + 1] * y, i + 1
    return x + (_norm(arrays, f"{at}.norm2", mix) if cfg["second_norm"] == "mix" else mix)


def transformer_block(cfg: dict[str, Any], arrays: dict[str, Array], at: str, x: Array) -> Array:
    qkv = _norm(arrays, f"{at}.norm1", x) @ _kernel(cfg, arrays, f"{at}.attention.qkv", "attention")
    time, width = x.shape
    size = width // cfg["n_heads"]
    heads = []
    for first in range(0, width, size):
        q, k, v = (qkv[:, first + part * width :][:, :size] for part in range(3))
        heads.append(top_k_attention(q, k, v, top_k=time))  # all of them: dense attention
    x = x + np.concatenate(heads, 1) @ _kernel(cfg, arrays, f"{at}.attention.out", "attention")
    return x + _pathway(cfg, arrays, f"{at}.dense", "dense", _norm(arrays, f"{at}.norm2", x))


def _norm(arrays: dict[str, Array], name: str, x: Array) -> Array:
    return layer_norm(x, arrays[f"{name}.scale"], arrays[f"{name}.bias"])


def _pathway(cfg: dict[str, Any], arrays: dict[str, Array], name: str, kind: str,
             h: Array) -> Array:
    if kind == "state":
        return state_space(h, *(arrays[f"{name}.{part}"] for part in ("a_raw", "b", "c")))
    if kind == "dense":
        up, down = (_kernel(cfg, arrays, f"{name}.{part}", "dense") for part in ("up", "down"))
        return gelu(h @ up) @ down
    if kind == "sparse":
        queries, keys, values = (_kernel(cfg, arrays, f"{name}.{part}", "attention")
                                 for part in ("query", "key", "value"))
        heads = [top_k_attention(h @ q, h @ k, h @ v, cfg["top_k"])
                 for q, k, v in zip(queries, keys, values, strict=True)]
        return np.sum(heads, axis=0) / (len(heads) if cfg["head_reduction"] == "mean" else 1)
    return causal_conv(h, _kernel(cfg, arrays, name, "conv"), arrays.get(f"{name}.bias", 0.0))


def _kernel(cfg: dict[str, Any], arrays: dict[str, Array], name: str, part: str) -> Array:
    """The kernel of that name, quantised if the configuration says so."""
    kernel, kind = arrays[f"{name}.kernel"], cfg["quantizer"]
    if part not in cfg.get("quantize", QUANTIZED):
        return kernel
    rotation = None
    if kind == "hadamard" and part not in ("conv", "embed"):
        size = kernel.shape[-2]
        rotation = sylvester(size) if size & (size - 1) == 0 else arrays[f"{name}.rotation"]
    return quantize(kernel, kind, arrays.get(f"{name}.alpha"), rotation)
