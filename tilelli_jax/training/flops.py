"""Operations of training and inference by formula, and devices' peak FLOP/s: model FLOP utilisation (MFU)."""

from __future__ import annotations

import re
from typing import Any

from tilelli_jax.models import ModelConfig
from tilelli_jax.models.gemma3 import Gemma3Config
from tilelli_jax.models.llama import LlamaConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig

# Peak FLOP/s of dense bfloat16 matrix products by JAX's `device_kind`, from the vendors' data sheets: without
# sparsity, accumulated in float32. The first matching pattern applies.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"^TPU v4$", 275e12),
    (r"^TPU v5 lite$|^TPU v5e$", 197e12),
    (r"^TPU v5p?$", 459e12),
    (r"^TPU v6 lite$|^TPU v6e$", 918e12),
    (r"^TPU ?7x$", 2307e12 / 2),  # a device is one of the chip's two dies
    (r"\bMIG\b", 0.0),  # a slice of a GPU: no data sheet
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH[12]00\b", 989e12),
    (r"\bB200\b", 2250e12),
    (r"\bA100\b", 312e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 3090$", 71e12),
    (r"\bT4\b", 65e12),  # float16: it has no bfloat16 units
    (r"\bRTX 4090$", 165.2e12),
)
# Chips whose two cores are one device or two, depending on the runtime's settings.
TWO_CORES = r"^TPU v(4|5p?)$"


def train_flops_per_token(config: ModelConfig, seq_len: int | None = None) -> float:
    """Returns the floating-point operations per byte of training, forward and backward.

    Counts matrix products, a multiplication and an addition as one operation each: 6 per weight that
    multiplies an activation (2 forward, 4 backward), and attention, averaged over a sequence's positions. A
    position attends to itself and all earlier ones, (seq_len + 1) / 2 keys on average:

    - dense attention: 6 · d_head per key for the scores, and the same for the values.
    - top-k attention: the forward scores use all keys, 2 · d_head each; the values (6 · d_model) and the
      scores' gradients (4 · d_head) use the selected keys only.

    These are the "model FLOPs" of Chowdhery et al. 2022 (arXiv:2204.02311, appendix B), except that causal
    attention counts only unmasked keys. An implementation that multiplies masked keys or recomputes
    activations (remat) does more work without credit. Not counted, as they are not matrix products:
    embedding look-ups, convolutions, the SSM, norms, softmax, quantisers, the optimiser.

    Args:
        seq_len: bytes in a sequence; None: the network's `max_seq_len`.
    """
    time = config.max_seq_len if seq_len is None else seq_len
    weights, attention = (_routed_block(config, time) if isinstance(config, RoutedConfig)
                          else _vanilla_block(config, time))
    unembed = config.vocab_size * config.d_model
    return 6.0 * (config.n_layers * weights + unembed) + config.n_layers * attention


def inference_flops(config: LlamaConfig | Gemma3Config, new: int, context: int) -> float:
    """Returns the floating-point operations for the last `new` of `context` tokens, the others being cached.

    Counted as in `train_flops_per_token`, forward only: 2 per weight and token, and per layer and visible key
    4 · n_heads · d_head. Logits are computed for the last token.
    """
    d, heads = config.d_model, config.n_heads * config.d_head
    block = d * (2 * heads + 2 * config.n_kv_heads * config.d_head) + 3 * d * config.d_hidden

    def visible(window: int | None) -> float:
        """The number of keys, summed over the new tokens."""
        def up_to(time: int) -> float:
            return time * _mean_keys(time, min(time, window or time)) if time else 0.0
        return up_to(context) - up_to(context - new)

    keys = sum(visible(config.window if kind == "sliding" else None) for kind in config.layers)
    return 2.0 * (new * config.n_layers * block + config.vocab_size * d) + 4.0 * heads * keys


def peak_flops(device: Any) -> float | None:
    """Returns the peak bfloat16 FLOP/s of a `jax.Device`; None if unknown, as for CPUs.

    With None no MFU is logged. To support a device, add a line to PEAKS.
    """
    kind = device.device_kind
    peak = next((peak for pattern, peak in PEAKS if re.search(pattern, kind)), 0.0)
    if re.search(TWO_CORES, kind) and getattr(device, "num_cores", 2) == 1:
        peak /= 2
    return peak or None


# ---------------------------------------------------------------------------------------------


def _routed_block(config: RoutedConfig, time: int) -> tuple[int, float]:
    """Returns the number of weights in a block's matrix products, and attention's operations per token."""
    d, banks = config.d_model, config.n_banks
    weights = d * len(config.pathways) * banks  # the router
    attention = 0.0
    if "sparse" in config.pathways:
        weights += banks * config.n_heads * d * (2 * config.d_head + d)
        selected = _mean_keys(time, config.top_k)
        scores = 2 * config.d_head * _mean_keys(time, time) + 4 * config.d_head * selected
        attention = banks * config.n_heads * (scores + 6 * d * selected)
    if "dense" in config.pathways:
        weights += banks * 2 * d * config.dense_expand * d
    return weights, attention


def _vanilla_block(config: VanillaConfig, time: int) -> tuple[int, float]:
    d = config.d_model
    return (4 + 2 * config.dense_expand) * d * d, 2 * 6 * d * _mean_keys(time, time)


def _mean_keys(time: int, max_keys: int) -> float:
    """Returns the number of keys per position, at most `max_keys`, averaged over positions 1 … time."""
    full = max(time - max_keys, 0)
    ramp = time - full
    return (ramp * (ramp + 1) / 2 + full * max_keys) / time
