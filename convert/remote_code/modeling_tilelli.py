"""Routed byte-level language models of tilelli_jax in PyTorch, for transformers with `trust_remote_code`.

The weights hold their quantised values, with the names and layouts of tilelli_jax: kernels are `[in, out]`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

EPSILON = 1e-5


class TilelliConfig(PretrainedConfig):
    """The settings of tilelli_jax's RoutedConfig, under the same names.

    Its `top_k` is `attention_top_k`, because transformers reads `top_k` as a setting of generation.
    """

    model_type = "tilelli_routed"

    def __init__(self, vocab_size: int = 256, d_model: int = 256, n_layers: int = 8, max_seq_len: int = 256,
                 positions: str = "learned", pathways: tuple[str, ...] = ("local", "sparse", "dense"),
                 n_banks: int = 1, local_kernel: int = 5, wide_kernel: int = 15, n_heads: int = 8,
                 d_head: int = 48, attention_top_k: int = 16, head_reduction: str = "mean",
                 dense_expand: int = 4,
                 second_norm: str = "none", conv_bias: bool = False, router_bias: bool = False,
                 **others: Any) -> None:
        self.vocab_size, self.d_model, self.n_layers = vocab_size, d_model, n_layers
        self.max_seq_len, self.positions, self.pathways = max_seq_len, positions, list(pathways)
        self.n_banks, self.local_kernel, self.wide_kernel = n_banks, local_kernel, wide_kernel
        self.n_heads, self.d_head, self.head_reduction = n_heads, d_head, head_reduction
        self.attention_top_k = attention_top_k
        self.dense_expand, self.second_norm = dense_expand, second_norm
        self.conv_bias, self.router_bias = conv_bias, router_bias
        super().__init__(**others)

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layers

    @property
    def max_position_embeddings(self) -> int:
        return self.max_seq_len


def parameter(*shape: int) -> nn.Parameter:
    """A parameter of zeros, until the weights are loaded."""
    return nn.Parameter(torch.zeros(shape))


class Norm(nn.Module):
    """Layer norm: `[batch, time, width]` → same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.bias = parameter(width), parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.bias, EPSILON)


class Kernel(nn.Module):
    """x · kernel (+ bias); `kernel [in, out]`, or any other shape where only the tensor is used."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.kernel = parameter(*shape)
        self.bias = parameter(shape[-1]) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.kernel
        return y if self.bias is None else y + self.bias


class Positions(nn.Module):
    """Learned absolute positions: table `[length, width]`."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = parameter(length, width)


class Convolution(Kernel):
    """Depthwise causal convolution; `kernel [taps, channels]`, the last tap at the current position."""

    def forward(self, x: Tensor) -> Tensor:
        taps, width = self.kernel.shape
        padded = F.pad(x.transpose(1, 2), (taps - 1, 0))
        return F.conv1d(padded, self.kernel.T[:, None], self.bias, groups=width).transpose(1, 2)


class StateSpace(nn.Module):
    """h_t = tanh(a_raw) h_{t-1} + b x_t, y_t = c h_t, channel by channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a_raw, self.b, self.c = parameter(width), parameter(width), parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        h, power, offset = x * self.b, torch.tanh(self.a_raw), 1
        while offset < h.shape[1]:
            h = torch.cat([h[:, :offset], h[:, offset:] + power * h[:, :-offset]], 1)
            power, offset = power * power, 2 * offset
        return h * self.c


class SparseAttention(nn.Module):
    """Each query attends to the k best keys up to its own position; of equal scores to the earliest."""

    def __init__(self, config: TilelliConfig) -> None:
        super().__init__()
        heads, width = config.n_heads, config.d_model
        self.query = Kernel(heads, width, config.d_head)
        self.key = Kernel(heads, width, config.d_head)
        self.value = Kernel(heads, width, width)
        self.top_k = config.attention_top_k
        self.head_weight = 1 / heads if config.head_reduction == "mean" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        query, key = (torch.einsum("btd,hde->bhte", x, part.kernel) for part in (self.query, self.key))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        best, order = scores.sort(dim=-1, descending=True, stable=True)
        k = min(self.top_k, time)
        kept = torch.full_like(scores, float("-inf")).scatter(-1, order[..., :k], best[..., :k])
        mixed = torch.einsum("bhts,bsd->bhtd", kept.softmax(-1), x)
        return torch.einsum("bhtd,hde->bte", mixed, self.value.kernel) * self.head_weight


class Dense(nn.Module):
    """The dense pathway, a feed-forward network: `[batch, time, width]` → same shape."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = Kernel(width, hidden), Kernel(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """x + Σ_i r_i P_i(norm(x)), with r = softmax(router(norm(x)))."""

    def __init__(self, config: TilelliConfig) -> None:
        super().__init__()
        self.names = [name if bank == 0 else f"{name}_{bank}"
                      for bank in range(config.n_banks) for name in config.pathways]
        self.second_norm = config.second_norm
        self.norm = Norm(config.d_model)
        if config.second_norm != "none":
            self.norm2 = Norm(config.d_model)
        self.router = Kernel(config.d_model, len(self.names), bias=config.router_bias)
        for name in self.names:
            self.add_module(name, pathway(name.partition("_")[0], config))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        dense_input = self.norm2(x) if self.second_norm == "dense" else h
        weights = self.router(h).float().softmax(-1).to(h.dtype)
        mixed = sum(weights[..., i : i + 1] * self.get_submodule(name)(
            dense_input if name.startswith("dense") else h) for i, name in enumerate(self.names))
        return x + (self.norm2(mixed) if self.second_norm == "mix" else mixed)


def pathway(name: str, config: TilelliConfig) -> nn.Module:
    """The module of one pathway."""
    width = config.d_model
    if name in ("local", "wide"):
        taps = config.local_kernel if name == "local" else config.wide_kernel
        return Convolution(taps, width, bias=config.conv_bias)
    if name == "state":
        return StateSpace(width)
    return SparseAttention(config) if name == "sparse" else Dense(width, config.dense_expand * width)


class TilelliForCausalLM(PreTrainedModel, GenerationMixin):
    """Byte ids `[batch, time]` → logits `[batch, time, vocab]`; without a cache."""

    config_class = TilelliConfig
    base_model_prefix = ""

    def __init__(self, config: TilelliConfig) -> None:
        super().__init__(config)
        self.embed = Kernel(config.vocab_size, config.d_model)
        self.positions = (Positions(config.max_seq_len, config.d_model) if config.positions == "learned"
                          else None)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.final_norm = Norm(config.d_model)
        self.unembed = None if config.tie_word_embeddings else Kernel(config.d_model, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # the weights are always read from a file

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                labels: Tensor | None = None, *, output_hidden_states: bool | None = None,
                return_dict: bool | None = None, logits_to_keep: int | Tensor = 0,
                num_items_in_batch: Tensor | int | None = None, use_cache: bool | None = None,
                position_ids: Tensor | None = None,
                **unsupported: Any) -> CausalLMOutput | tuple[Tensor, ...]:
        """As in transformers; the last of the hidden states is after the final norm. There is no cache.

        Raises ValueError for an argument that would change the result and is not supported.
        """
        for name, value in unsupported.items():
            if value is not None and value is not False:
                raise ValueError(f"{name}: not supported, expected None, found {type(value).__name__}")
        if input_ids is None:
            raise ValueError("input_ids: expected byte ids, found None")
        if position_ids is not None:
            check_positions(position_ids, attention_mask)
        ids, start = input_ids, None
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            start = attention_mask.long().argmax(1)  # padding on the left: rows begin at position 0
            ids = rolled(ids, start)
        x = self.embed.kernel[ids]
        if self.positions is not None:
            if ids.shape[1] > len(self.positions.table):
                raise ValueError(f"expected at most {len(self.positions.table)} ids, found {ids.shape[1]}")
            x = x + self.positions.table[: ids.shape[1]]
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        states[-1] = self.final_norm(states[-1])
        if start is not None:
            states = [rolled(state, -start) for state in states]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = states[-1][:, kept]
        logits = x @ self.embed.kernel.T if self.unembed is None else self.unembed(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(),
                                   reduction="mean" if num_items_in_batch is None else "sum")
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = CausalLMOutput(loss=loss, logits=logits,
                                hidden_states=tuple(states) if output_hidden_states else None)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                                      **unused: Any) -> dict[str, Any]:
        """The whole text at every step; with learned positions, the last `max_seq_len` bytes."""
        window = self.config.max_seq_len
        mask = None if attention_mask is None else attention_mask[:, -window:]
        return {"input_ids": input_ids[:, -window:], "attention_mask": mask}


def check_positions(position_ids: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError if positions do not count from 0 at each row's first byte."""
    expected = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    if mask is not None:
        expected = torch.where(mask.bool(), mask.long().cumsum(1) - 1, position_ids)
    if not torch.equal(position_ids, expected):
        raise ValueError("position_ids: expected 0, 1, … from each row's first byte, found others")


def rolled(x: Tensor, start: Tensor) -> Tensor:
    """Row b of `[batch, time, …]`, rolled so that it begins at position start[b]."""
    positions = (torch.arange(x.shape[1], device=x.device) + start[:, None]) % x.shape[1]
    return torch.take_along_dim(x, positions.reshape(*positions.shape, *(1,) * (x.dim() - 2)), 1)
