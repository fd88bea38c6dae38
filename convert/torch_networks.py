"""The Tilelli networks in eager PyTorch, in one of three forms.

    fast     each part as PyTorch runs it fastest
    exact    the same, and equal scores keep the earliest positions, which `torch.topk` leaves open
    written  as the formulas read: the state pathway as a convolution with its whole response, sparse
             attention as a masked softmax over values of every head

`cfg` is the model section of a configuration as a plain dict. `load_arrays` and `named_gradients`
speak the library's names and layouts, (in, out) kernels, so that the two sides can be compared.
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
QUANTIZED = ("conv", "attention", "dense")  # where the configuration does not say


def build(cfg: dict[str, Any], form: Form = "fast") -> TorchRouted | TorchVanilla:
    """The network that `cfg["family"]` names."""
    return TorchVanilla(cfg) if cfg["family"] == "vanilla" else TorchRouted(cfg, form)


def quantizer_of(cfg: dict[str, Any], part: str) -> str:
    kind: str = cfg.get("quantizer", "none")
    return kind if part in cfg.get("quantize", QUANTIZED) else "none"


class _Scan(torch.autograd.Function):
    """h_t = a h_{t-1} + u_t by doubling; [batch, time, width] and [width].

    The gradient is the same scan from the other end; left to autograd, the slices of each round
    would cost twice the time of all the rest.
    """

    @staticmethod
    def forward(ctx: Any, drive: Tensor, decay: Tensor) -> Tensor:
        h, power, reach = drive, decay, 1
        while reach < h.shape[1]:
            h = torch.cat([h[:, :reach], torch.addcmul(h[:, reach:], power, h[:, :-reach])], 1)
            power, reach = power * power, 2 * reach
        ctx.save_for_backward(h, decay)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, decay = ctx.saved_tensors
        s, power, reach = grad, decay, 1
        while reach < s.shape[1]:
            s = torch.cat([torch.addcmul(s[:, :-reach], power, s[:, reach:]), s[:, -reach:]], 1)
            power, reach = power * power, 2 * reach
        return s, (s[:, 1:] * h[:, :-1]).sum((0, 1))


class StateSpace(nn.Module):
    """h_t = a h_{t-1} + b x_t, y_t = c h_t with a = tanh(a_raw), each channel by itself."""

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
    """Each query attends to its k best earlier positions; heads are reduced to one d_model.

    The rows of x are mixed before the value matrices are applied, which are linear: one product
    then projects and reduces all heads, and `embedding_bag` reads k rows a query and no more.
    """

    def __init__(self, width: int, heads: int, d_head: int, top_k: int, reduction: str,
                 kind: str, form: Form) -> None:
        super().__init__()
        self.query = Linear(width, d_head, kind, heads=(heads,))
        self.key = Linear(width, d_head, kind, heads=(heads,))
        self.value = Linear(width, width, kind, heads=(heads,))
        self.top_k, self.form = top_k, form
        self.share = 1 / heads if reduction == "mean" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] -> the same."""
        batch, time, width = x.shape
        heads, d_head, _ = self.query.weight.shape
        q, k = (part(x).view(batch, time, heads, d_head).transpose(1, 2)
                for part in (self.query, self.key))
        scores = q @ k.transpose(-1, -2) / d_head**0.5
        future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        best, kept = self.largest(scores)
        if self.form == "written":
            sparse = torch.full_like(scores, float("-inf")).scatter(-1, kept, best)
            values = self.value(x).view(batch, time, heads, width).transpose(1, 2)
            return (sparse.softmax(-1) @ values).sum(1) * self.share
        weights = best.softmax(-1).transpose(1, 2).flatten(0, 2)  # [batch * time * heads, k]
        first_row = time * torch.arange(batch, device=x.device)
        rows = (kept + first_row[:, None, None, None]).transpose(1, 2).flatten(0, 2)
        mixed = F.embedding_bag(rows, x.flatten(0, 1), per_sample_weights=weights, mode="sum")
        mixed = self.value.turned(mixed).view(batch, time, heads * width)
        values = self.value.weights().transpose(0, 1).flatten(1)  # [width, heads * width]
        return F.linear(mixed, values * self.share)

    def largest(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        size = min(self.top_k, scores.shape[-1])
        if self.form != "exact":
            return scores.topk(size, dim=-1)
        best, order = scores.sort(dim=-1, descending=True, stable=True)
        return best[..., :size], order[..., :size]


class FeedForward(nn.Module):
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
        share = self.router(h).softmax(-1)
        total = torch.zeros_like(x) if self.second == "mix" else x
        for i, name in enumerate(self.names):
            own = self.second == "dense" and name.startswith("dense")
            y = self.get_submodule(name)(self.norm2(x) if own else h)
            total = torch.addcmul(total, share[..., i : i + 1], y)
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
    """Lite, its parent and atome, by configuration."""

    def __init__(self, cfg: dict[str, Any], form: Form) -> None:
        super().__init__(cfg, [RoutedBlock(cfg, form) for _ in range(cfg["n_layers"])])


class TorchVanilla(_Network):
    """The pre-norm transformer of equal size."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__(cfg, [TransformerBlock(cfg) for _ in range(cfg["n_layers"])])


# --- the library's names and layouts ---------------------------------------------------------


def named_tensors(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """The library's name -> (how the layouts differ, the tensor), for all that a model stores."""
    found: dict[str, tuple[str, Tensor]] = {}
    for prefix, part in module.named_modules():
        renamed = {Linear: ("kernel", "transposed"), CausalConv: ("kernel", "taps"),
                   Embedding: ("kernel", "same"), nn.Embedding: ("table", "same"),
                   nn.LayerNorm: ("scale", "same")}
        weight, layout = renamed.get(type(part), ("", ""))
        stored = part.state_dict(keep_vars=True)
        for name in [*part._parameters, *part._buffers]:
            if name in stored:
                ours, change = (weight, layout) if name == "weight" else (name, "same")
                found[f"{prefix}.{ours}".lstrip(".")] = change, stored[name]
    return found


def load_arrays(module: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Fills a network from the library's arrays; every name and shape must be the other's."""
    tensors = named_tensors(module)
    if set(tensors) != set(arrays):
        raise ValueError(f"names on one side only: {sorted(set(tensors) ^ set(arrays))}")
    for name, (layout, tensor) in tensors.items():
        # np.array, not torch's from_numpy: an array that JAX owns must not be written into
        array = torch.from_numpy(np.array(arrays[name], dtype=np.float32))
        if layout == "taps":
            array = array.T[:, None]
        elif layout == "transposed":
            array = array.transpose(-1, -2)
        if array.shape != tensor.shape:
            raise ValueError(f"{name}: {tuple(array.shape)}, expected {tuple(tensor.shape)}")
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
