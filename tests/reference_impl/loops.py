"""Reference implementations of the networks and layers as simple loops in float64.

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
    """Causal convolution with kernel [taps, width]; the last tap multiplies the current position."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for tap in range(len(kernel)):
            position = t - (len(kernel) - 1 - tap)
            if position >= 0:
                y[t] += kernel[tap] * x[position]
    return y + bias


def state_space(x: Array, a_raw: Array, b: Array, c: Array) -> Array:
    """The recurrence h_t = a h_{t-1} + b x_t, y_t = c h_t."""
    h, y = np.zeros(x.shape[1]), np.zeros_like(x)
    for t in range(len(x)):
        h = np.tanh(a_raw) * h + b * x[t]
        y[t] = c * h
    return y


def state_space_kernel(a_raw: Array, b: Array, c: Array, time: int) -> Array:
    """The equivalent causal convolution kernel [time, width]; the last tap is the current position."""
    return np.stack([c * np.tanh(a_raw) ** (time - 1 - tap) * b for tap in range(time)])


def top_k_attention(q: Array, k: Array, v: Array, top_k: int) -> Array:
    """One head; q, k [time, d_head], v [time, any]. Ties keep the earliest positions."""
    y = np.zeros_like(v)
    for t in range(len(q)):
        scores = [float(q[t] @ k[s]) / math.sqrt(q.shape[1]) for s in range(t + 1)]
        selected = sorted(range(t + 1), key=lambda s: (-scores[s], s))[:top_k]
        largest = max(scores)
        weights = {s: math.exp(scores[s] - largest) for s in selected}
        for s in selected:
            y[t] += weights[s] / sum(weights.values()) * v[s]
    return y


def level(ratio: float, powers: bool) -> float:
    """The level to which w / scale is rounded."""
    if not powers:
        return float(min(max(round(ratio), -1), 1))  # Python rounds half to even
    magnitude = sum(step for bound, step in ((0.5, 1), (2, 2), (6, 6)) if abs(ratio) > bound)
    return math.copysign(magnitude, ratio)


def quantize(kernel: Array, kind: str, alpha: Array | None = None,
             rotation: Array | None = None) -> Array:
    """Quantises a kernel [..., in, out], number by number."""
    if kind == "none":
        return kernel
    if kernel.ndim > 2:
        return np.stack([quantize(part, kind, None if alpha is None else alpha[i], rotation)
                         for i, part in enumerate(kernel)])
    if rotation is not None:
        return rotation @ quantize(rotation.T @ kernel, "ternary")
    result = np.zeros_like(kernel)
    for column in range(kernel.shape[1]):
        scaled_part = kernel[:, column] if kind.endswith("_row") else kernel
        scale = max(np.abs(scaled_part).mean(), 1e-5) if alpha is None else float(alpha)
        for row in range(kernel.shape[0]):
            result[row, column] = scale * level(kernel[row, column] / scale, "power3" in kind)
    return result


def sylvester(size: int) -> Array:
    """Entry (i, j) is the sign of the parity of i & j, over √size."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs) / math.sqrt(size)


def forward(cfg: dict[str, Any], arrays: dict[str, Array], ids: Array) -> Array:
    """Logits of the configured network: integers [batch, time] -> [batch, time, vocab]."""
    arrays = {name: value.astype(np.float64) for name, value in arrays.items()}
    return np.stack([_sequence(cfg, arrays, row) for row in ids])


def _sequence(cfg: dict[str, Any], arrays: dict[str, Array], ids: Array) -> Array:
    # The table's rows are its output features, which have the scales: transpose it for quantisation.
    table = _kernel(cfg, {**arrays, "embed.kernel": arrays["embed.kernel"].T}, "embed", "embed").T
    x = np.stack([table[i] for i in ids])
    if cfg["positions"] == "learned":
        x = x + arrays["positions.table"][: len(ids)]
    block = transformer_block if cfg["family"] == "vanilla" else routed_block
    for n in range(cfg["n_layers"]):
        x = block(cfg, arrays, f"blocks.{n}", x)
    x = _norm(arrays, "final_norm", x)
    return x @ (table.T if cfg["tie_embeddings"] else _kernel(cfg, arrays, "unembed", "unembed"))


def routed_block(cfg: dict[str, Any], arrays: dict[str, Array], prefix: str, x: Array) -> Array:
    h = _norm(arrays, f"{prefix}.norm", x)
    logits = h @ _kernel(cfg, arrays, f"{prefix}.router", "router")
    weights = softmax(logits + arrays.get(f"{prefix}.router.bias", 0.0))
    mix, i = np.zeros_like(x), 0
    for bank in range(cfg["n_banks"]):
        for kind in cfg["pathways"]:
            name = f"{prefix}.{kind}_{bank}" if bank else f"{prefix}.{kind}"
            second_norm = kind == "dense" and cfg["second_norm"] == "dense"
            y = _pathway(cfg, arrays, name, kind, _norm(arrays, f"{prefix}.norm2", x) if second_norm else h)
            mix, i = mix + weights[:, i : i + 1] * y, i + 1
    return x + (_norm(arrays, f"{prefix}.norm2", mix) if cfg["second_norm"] == "mix" else mix)


def transformer_block(cfg: dict[str, Any], arrays: dict[str, Array], prefix: str, x: Array) -> Array:
    qkv = _norm(arrays, f"{prefix}.norm1", x) @ _kernel(cfg, arrays, f"{prefix}.attention.qkv", "attention")
    time, width = x.shape
    size = width // cfg["n_heads"]
    heads = []
    for first in range(0, width, size):
        q, k, v = (qkv[:, first + part * width :][:, :size] for part in range(3))
        heads.append(top_k_attention(q, k, v, top_k=time))  # all keys: dense attention
    x = x + np.concatenate(heads, 1) @ _kernel(cfg, arrays, f"{prefix}.attention.out", "attention")
    return x + _pathway(cfg, arrays, f"{prefix}.dense", "dense", _norm(arrays, f"{prefix}.norm2", x))


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
    """The kernel with this name, quantised according to the configuration."""
    kernel, kind = arrays[f"{name}.kernel"], cfg["quantizer"]
    if part not in cfg.get("quantize", QUANTIZED):
        return kernel
    rotation = None
    if kind == "hadamard" and part not in ("conv", "embed"):
        size = kernel.shape[-2]
        rotation = sylvester(size) if size & (size - 1) == 0 else arrays[f"{name}.rotation"]
    return quantize(kernel, kind, arrays.get(f"{name}.alpha"), rotation)
