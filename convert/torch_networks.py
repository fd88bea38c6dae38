"""The Tilelli networks in eager PyTorch, in one of three forms.

    fast     the fastest implementation of each part in PyTorch
    exact    like fast, but among equal attention scores the earliest positions are selected; `torch.topk`
             does not define which
    written  a direct implementation of the formulas: the state pathway as a convolution with its full impulse
             response, sparse attention as a masked softmax over the values of every head

`cfg` is the model section of a configuration as a plain dict. `load_arrays` and `named_gradients` use the
library's names and layouts ((in, out) kernels), so that results of the two libraries can be compared.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .torch_layers import CausalConv, Embedding, Linear

EPSILON = 1e-5
Form = Literal["fast", "exact", "written"]
QUANTIZED = ("conv", "attention", "dense")  # default if the configuration has no `quantize`


def build(cfg: dict[str, Any], form: Form = "fast") -> TorchRouted | TorchVanilla:
    """The network that `cfg["family"]` names."""
    return TorchVanilla(cfg) if cfg["family"] == "vanilla" else TorchRouted(cfg, form)


def quantizer_of(cfg: dict[str, Any], part: str) -> str:
    """The quantiser of the weights of one part of a network; "none" where they are not quantised."""
    kind: str = cfg.get("quantizer", "none")
    return kind if part in cfg.get("quantize", QUANTIZED) else "none"


class _Scan(torch.autograd.Function):
    """h_t = a h_{t-1} + u_t in log₂(time) rounds; drive [batch, time, width], decay [width].

    The gradient is the same scan in reverse. With autograd, the slices of each round would take
    twice the time of everything else.
    """

    @staticmethod
    def forward(ctx: Any, drive: Tensor, decay: Tensor) -> Tensor:
        h, power, offset = drive, decay, 1
        while offset < h.shape[1]:
            h = torch.cat([h[:, :offset], torch.addcmul(h[:, offset:], power, h[:, :-offset])], 1)
            power, offset = power * power, 2 * offset
        ctx.save_for_backward(h, decay)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, decay = ctx.saved_tensors
        s, power, offset = grad, decay, 1
        while offset < s.shape[1]:
            s = torch.cat([torch.addcmul(s[:, :-offset], power, s[:, offset:]), s[:, -offset:]], 1)
            power, offset = power * power, 2 * offset
        return s, (s[:, 1:] * h[:, :-1]).sum((0, 1))


class StateSpace(nn.Module):
    """h_t = a h_{t-1} + b x_t, y_t = c h_t with a = tanh(a_raw), independently for each channel."""

    def __init__(self, width: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.a_raw = nn.Parameter(torch.full((width,), 1.5))
        self.b = nn.Parameter(torch.randn(width) / width**0.5)
        self.c = nn.Parameter(torch.randn(width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        a, time = torch.tanh(self.a_raw), x.shape[1]
        if self.form != "written":
            return _Scan.apply(x * self.b, a) * self.c
        response = (self.c * self.b * a ** torch.arange(time - 1, -1, -1)[:, None]).T[:, None]
        padded = F.pad(x.transpose(1, 2), (time - 1, 0))
        return F.conv1d(padded, response, groups=x.shape[2]).transpose(1, 2)


class TopKAttention(nn.Module):
    """Each query attends to its k highest-scoring positions up to its own; heads are averaged or summed.

    Since the value matrices are linear, the rows of x are mixed before they are applied: one product then
    projects and reduces all heads, and `embedding_bag` reads only k rows per query.
    """

    def __init__(self, width: int, heads: int, d_head: int, top_k: int, reduction: str,
                 kind: str, form: Form) -> None:
        super().__init__()
        self.query = Linear(width, d_head, kind, heads=(heads,))
        self.key = Linear(width, d_head, kind, heads=(heads,))
        self.value = Linear(width, width, kind, heads=(heads,))
        self.top_k, self.form = top_k, form
        self.head_weight = 1 / heads if reduction == "mean" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] -> same shape."""
        batch, time, width = x.shape
        heads, d_head, _ = self.query.weight.shape
        q, k = (part(x).view(batch, time, heads, d_head).transpose(1, 2)
                for part in (self.query, self.key))
        scores = q @ k.transpose(-1, -2) / d_head**0.5
        future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        top_scores, indices = self.top_k_scores(scores)
        if self.form == "written":
            sparse = torch.full_like(scores, float("-inf")).scatter(-1, indices, top_scores)
            values = self.value(x).view(batch, time, heads, width).transpose(1, 2)
            return (sparse.softmax(-1) @ values).sum(1) * self.head_weight
        weights = top_scores.softmax(-1).transpose(1, 2).flatten(0, 2)  # [batch * time * heads, k]
        first_row = time * torch.arange(batch, device=x.device)
        rows = (indices + first_row[:, None, None, None]).transpose(1, 2).flatten(0, 2)
        mixed = F.embedding_bag(rows, x.flatten(0, 1), per_sample_weights=weights, mode="sum")
        mixed = self.value.rotated_input(mixed).view(batch, time, heads * width)
        values = self.value.weights().transpose(0, 1).flatten(1)  # [width, heads * width]
        return F.linear(mixed, values * self.head_weight)

    def top_k_scores(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        size = min(self.top_k, scores.shape[-1])
        if self.form != "exact":
            return scores.topk(size, dim=-1)
        top_scores, order = scores.sort(dim=-1, descending=True, stable=True)
        return top_scores[..., :size], order[..., :size]


class FeedForward(nn.Module):
    """A feed-forward network of two layers: `[batch, time, width]` → same shape."""

    def __init__(self, width: int, expand: int, kind: str) -> None:
        super().__init__()
        self.up = Linear(width, expand * width, kind)
        self.down = Linear(expand * width, width, kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class RoutedBlock(nn.Module):
    """x + Σ r_i P_i(LayerNorm(x)) with r = softmax of a linear router."""

    def __init__(self, cfg: dict[str, Any], form: Form) -> None:
        super().__init__()
        width = cfg["d_model"]
        self.second = cfg.get("second_norm", "none")
        self.names = [name if bank == 0 else f"{name}_{bank}"
                      for bank in range(cfg.get("n_banks", 1)) for name in cfg["pathways"]]
        self.norm = nn.LayerNorm(width, EPSILON)
        if self.second != "none":
            self.norm2 = nn.LayerNorm(width, EPSILON)
        self.router = Linear(width, len(self.names), quantizer_of(cfg, "router"),
                             cfg.get("router_bias", False))
        for name in self.names:
            self.add_module(name, _pathway(name.partition("_")[0], cfg, form))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights = self.router(h).softmax(-1)
        total = torch.zeros_like(x) if self.second == "mix" else x
        for i, name in enumerate(self.names):
            has_own_norm = self.second == "dense" and name.startswith("dense")
            y = self.get_submodule(name)(self.norm2(x) if has_own_norm else h)
            total = torch.addcmul(total, weights[..., i : i + 1], y)
        return x + self.norm2(total) if self.second == "mix" else total


def _pathway(name: str, cfg: dict[str, Any], form: Form) -> nn.Module:
    width, conv = cfg["d_model"], (quantizer_of(cfg, "conv"), cfg.get("conv_bias", False))
    match name:
        case "local":
            return CausalConv(width, cfg["local_kernel"], *conv)
        case "wide":
            return CausalConv(width, cfg["wide_kernel"], *conv)
        case "state":
            return StateSpace(width, form)
        case "sparse":
            return TopKAttention(width, cfg["n_heads"], cfg["d_head"], cfg["top_k"],
                                 cfg.get("head_reduction", "mean"),
                                 quantizer_of(cfg, "attention"), form)
        case "dense":
            return FeedForward(width, cfg["dense_expand"], quantizer_of(cfg, "dense"))
    raise ValueError(name)


class SelfAttention(nn.Module):
    """Causal multi-head attention: `[batch, time, width]` → same shape."""

    def __init__(self, width: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, kind)
        self.out = Linear(width, width, kind)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        split = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class TransformerBlock(nn.Module):
    """A block of the vanilla transformer, with pre-norms: `[batch, time, width]` → same shape."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        width = cfg["d_model"]
        self.norm1 = nn.LayerNorm(width, EPSILON)
        self.attention = SelfAttention(width, cfg["n_heads"], quantizer_of(cfg, "attention"))
        self.norm2 = nn.LayerNorm(width, EPSILON)
        self.dense = FeedForward(width, cfg["dense_expand"], quantizer_of(cfg, "dense"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.dense(self.norm2(x))


class _Network(nn.Module):
    """Bytes -> embedding (+ positions) -> blocks -> LayerNorm -> logits."""

    def __init__(self, cfg: dict[str, Any], blocks: list[nn.Module]) -> None:
        super().__init__()
        entries, width = cfg["vocab_size"], cfg["d_model"]
        self.embed = Embedding(entries, width, quantizer_of(cfg, "embed"))
        learned = cfg.get("positions", "learned") == "learned"
        self.positions = nn.Embedding(cfg["max_seq_len"], width) if learned else None
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(width, EPSILON)
        tied = cfg.get("tie_embeddings", False)
        self.unembed = None if tied else Linear(width, entries, quantizer_of(cfg, "unembed"))

    def forward(self, ids: Tensor) -> Tensor:
        """Integers [batch, time] -> logits [batch, time, vocab]."""
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        return F.linear(x, self.embed.table()) if self.unembed is None else self.unembed(x)


class TorchRouted(_Network):
    """The routed networks Lite, parent and atome; the configuration selects which."""

    def __init__(self, cfg: dict[str, Any], form: Form) -> None:
        super().__init__(cfg, [RoutedBlock(cfg, form) for _ in range(cfg["n_layers"])])


class TorchVanilla(_Network):
    """The pre-norm transformer baseline."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__(cfg, [TransformerBlock(cfg) for _ in range(cfg["n_layers"])])


# --- the library's names and layouts ---------------------------------------------------------


def named_tensors(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """The library's name -> (difference of layout, tensor), for all stored parameters and buffers."""
    tensors: dict[str, tuple[str, Tensor]] = {}
    for prefix, part in module.named_modules():
        leaf_names = {Linear: ("kernel", "transposed"), CausalConv: ("kernel", "taps"),
                      Embedding: ("kernel", "same"), nn.Embedding: ("table", "same"),
                      nn.LayerNorm: ("scale", "same")}
        weight, layout = leaf_names.get(type(part), ("", ""))
        stored = part.state_dict(keep_vars=True)
        for name in [*part._parameters, *part._buffers]:
            if name in stored:
                leaf, layout_change = (weight, layout) if name == "weight" else (name, "same")
                tensors[f"{prefix}.{leaf}".lstrip(".")] = layout_change, stored[name]
    return tensors


def load_arrays(module: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Fills a network from the library's arrays. Raises ValueError if names or shapes differ."""
    tensors = named_tensors(module)
    if set(tensors) != set(arrays):
        raise ValueError(f"names in only one of the two: {sorted(set(tensors) ^ set(arrays))}")
    for name, (layout, tensor) in tensors.items():
        # A copy by np.array: from_numpy would share memory with an array that JAX owns.
        array = torch.from_numpy(np.array(arrays[name], dtype=np.float32))
        if layout == "taps":
            array = array.T[:, None]
        elif layout == "transposed":
            array = array.transpose(-1, -2)
        if array.shape != tensor.shape:
            raise ValueError(f"{name}: expected {tuple(tensor.shape)}, found {tuple(array.shape)}")
        tensor.data.copy_(array)


def named_gradients(module: nn.Module) -> dict[str, np.ndarray]:
    """The gradient of every trained tensor after `backward`; zeros where it received none."""
    gradients = {}
    for name, (layout, tensor) in named_tensors(module).items():
        if tensor.requires_grad:
            grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            if layout == "taps":
                grad = grad[:, 0].T
            elif layout == "transposed":
                grad = grad.transpose(-1, -2)
            gradients[name] = grad.cpu().numpy().copy()
    return gradients
