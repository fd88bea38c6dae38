"""Operations of a training step by formula, and what a device could do at best: both sides of MFU."""

from __future__ import annotations

import re
from typing import Any

from tilelli_jax.models import ModelConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig

# Dense bfloat16 products, in FLOP/s, by JAX's `device_kind`: vendors' data sheets, without
# sparsity, accumulating in float32. The first pattern found holds.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"^TPU v4$", 275e12),
    (r"^TPU v5 lite$|^TPU v5e$", 197e12),
    (r"^TPU v5p?$", 459e12),
    (r"^TPU v6 lite$|^TPU v6e$", 918e12),
    (r"^TPU ?7x$", 2307e12 / 2),  # a device is one of the chip's two dies
    (r"\bMIG\b", 0.0),  # a part of a GPU: no data sheet
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
    (r"\bT4\b", 65e12),  # float16: it has no units for bfloat16
    (r"\bRTX 4090$", 165.2e12),
)
# Chips whose two cores may be one device or two, as the runtime is set.
TWO_CORES = r"^TPU v(4|5p?)$"


def train_flops_per_token(config: ModelConfig, seq_len: int | None = None) -> float:
    """Floating-point operations that one byte of training needs, forward and backward.

    Counted are matrix products, a multiplication and an addition each: 6 for every weight that an
    activation is multiplied by (2 forward, 4 backward), and attention, averaged over the positions
    of a sequence. A position attends to itself and what is before it, (seq_len + 1) / 2 on average:

    - dense attention: 6 · d_head for each of those keys, for the scores and again for the values.
    - top-k attention: scores forward with all of those keys, 2 · d_head each; everything else, that
      is the values (6 · d_model) and the scores' gradients (4 · d_head), with the kept keys only.

    This is what the mathematics needs, the "model FLOPs" of Chowdhery et al. 2022
    (arXiv:2204.02311, appendix B), but for the causal half, which they count whole. An
    implementation that multiplies masked keys, or computes activations twice (remat), does more
    and gets no credit for it. Not counted, as they are no matrix products: embedding look-ups,
    convolutions, the SSM, norms, softmax, quantisers, the optimiser.

    Args:
        seq_len: bytes in a sequence; by default as many as the network takes.
    """
    time = config.max_seq_len if seq_len is None else seq_len
    weights, attention = (_routed_block(config, time) if isinstance(config, RoutedConfig)
                          else _vanilla_block(config, time))
    unembed = config.vocab_size * config.d_model
    return 6.0 * (config.n_layers * weights + unembed) + config.n_layers * attention


def peak_flops(device: Any) -> float | None:
    """bfloat16 FLOP/s of one `jax.Device` at best; None where it is not known (CPUs among them).

    Nothing then logs an MFU; a line in PEAKS is all it takes.
    """
    kind = device.device_kind
    peak = next((peak for pattern, peak in PEAKS if re.search(pattern, kind)), 0.0)
    if re.search(TWO_CORES, kind) and getattr(device, "num_cores", 2) == 1:
        peak /= 2
    return peak or None


# ---------------------------------------------------------------------------------------------


def _routed_block(config: RoutedConfig, time: int) -> tuple[int, float]:
    """Weights of a block's matrix products, and attention's operations for one token."""
    d, banks = config.d_model, config.n_banks
    weights = d * len(config.pathways) * banks  # the router
    attention = 0.0
    if "sparse" in config.pathways:
        weights += banks * config.n_heads * d * (2 * config.d_head + d)
        kept = _mean_keys(time, config.top_k)
        scores = 2 * config.d_head * _mean_keys(time, time) + 4 * config.d_head * kept
        attention = banks * config.n_heads * (scores + 6 * d * kept)
    if "dense" in config.pathways:
        weights += banks * 2 * d * config.dense_expand * d
    return weights, attention


def _vanilla_block(config: VanillaConfig, time: int) -> tuple[int, float]:
    d = config.d_model
    return (4 + 2 * config.dense_expand) * d * d, 2 * 6 * d * _mean_keys(time, time)


def _mean_keys(time: int, most: int) -> float:
    """Keys that a position attends to, at most `most`, averaged over positions 1 … time."""
    full = max(time - most, 0)
    ramp = time - full
    return (ramp * (ramp + 1) / 2 + full * most) / time
