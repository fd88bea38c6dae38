"""Tilelli's routed networks in `.pt` files, whose tensor names are published only in part.

A tensor is therefore identified by the end of its name and by its shape:
`blocks.3.sparse.heads.5.Wq.weight`, `blocks.3.paths.1.Wq.weight` and `blocks.3.attn.q_proj.weight` are all
queries, of one head or of several fused heads. The parts of a block are inferred from block 0; the other
blocks must have the same parts. Settings that no tensor determines (top_k, the quantiser, …) come from the
file's configuration or from `--set`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor
from tilelli_jax.models.routed import RoutedConfig, RoutedLM
from tilelli_jax.pretrained.mapping import Names, Theirs, transposed

from ..plan import Assumption, Plan, SourceFamily, configured, key_of, make_plan
from ..source import Source
from .common import (
    cannot_infer,
    has_library_settings,
    library_settings,
    quantized_parts,
    quantizer_setting,
    shape_of,
    stripped,
    tied_duplicates,
)

_BLOCK = re.compile(r"(blocks|layers|h)\.(\d+)\.(.+)")
_TOP_PATTERNS: dict[str, tuple[str, int]] = {  # part → pattern of the end of its name, number of axes
    "embed": (r"(tok_?|token_)?(embed(ding)?|emb|wte)(\.weight)?", 2),
    "positions": (r"(pos_?(embed(ding)?|emb)?|position_embed(ding)?s?|positions|wpe)(\.weight)?", 2),
    "final_norm": (r"(final_norm|norm_final|norm_f|ln_f|norm)\.weight", 1),
    "unembed": (r"(unembed|lm_head|head|out)\.weight", 2), "abstain": (r"abstain\.weight", 2)}
_BLOCK_PATTERNS: dict[str, tuple[str, int]] = {
    "query": (r"(W_?q|q_proj|query|q)(\.weight)?", 2), "key": (r"(W_?k|k_proj|key|k)(\.weight)?", 2),
    "value": (r"(W_?v|v_proj|value|v)(\.weight)?", 2),
    "router": (r"(router|gate)(\.\w+)?\.weight", 2), "up": (r"(up|up_proj|w1|fc1)(\.weight)?", 2),
    "down": (r"(down|down_proj|w2|fc2)(\.weight)?", 2), "a_raw": ("a_raw", 1), "b": ("b", 1),
    "c": (r"c(_out)?", 1), "norm": (r"\w*(norm|ln)\w*\.weight", 1)}
_PATHWAY_ORDER = ("local", "wide", "state", "sparse", "dense")  # default order in the router
_FILE_KEYS = {"local_kernel": "kernel_size"}  # our setting → its key in the file's configuration


def _find_parts(tensors: Mapping[str, Tensor],
                patterns: Mapping[str, tuple[str, int]]) -> dict[str, list[str]]:
    """Groups tensor names by part; keeps the order of the file."""
    grouped: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        for part, (ending, rank) in patterns.items():
            if len(tensor.shape) == rank and re.search(rf"(^|\.){ending}$", name):
                grouped.setdefault(part, []).append(name)
                break
    return grouped


def _numeric_key(name: str) -> list[Any]:
    """Sort key that compares numbers by value: heads.2 before heads.10."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)]


def _add_by_shape(block_tensors: Mapping[str, Tensor], d_model: int, parts: dict[str, list[str]]) -> None:
    """Adds parts identified by shape only: convolutions, and feed-forward weights with unknown names."""
    known = {name for names in parts.values() for name in names}
    for name, tensor in block_tensors.items():
        shape = tensor.shape
        if len(shape) == 3 and shape[:2] == (d_model, 1):
            parts.setdefault("conv", []).append(name)
        elif len(shape) == 2 and name not in known and shape[0] != shape[1] and d_model in shape:
            part = "up" if shape[1] == d_model else "down"
            parts.setdefault(part, []).append(name)


def _common_pattern(names: list[str]) -> str:
    """Returns one pattern for all names, with `{h}` for the number that runs from 0 to `len(names) - 1`.

    Raises:
        ValueError: the names do not differ in exactly one such number.
    """
    if len(names) == 1:
        return names[0]
    pieces = [re.split(r"(\d+)", name) for name in names]
    if len({len(piece) for piece in pieces}) == 1:
        differing = [i for i, column in enumerate(zip(*pieces, strict=True)) if len(set(column)) > 1]
        expected = set(map(str, range(len(names))))
        if len(differing) == 1 and {piece[differing[0]] for piece in pieces} == expected:
            piece = list(pieces[0])
            piece[differing[0]] = "{h}"
            return "".join(piece)
    raise ValueError


class _Layout:
    """Settings and tensor names, inferred from block 0 and from the tensors outside of blocks."""

    def __init__(self, source: Source, overrides: Sequence[str]) -> None:
        self.source, self.overrides = source, overrides
        self.tensors = source.tensors
        blocks = [match for match in map(_BLOCK.fullmatch, self.tensors) if match]
        if not blocks:
            raise InputError(f"{source.path}: expected tensors named blocks.0.…, found none; --map can "
                             "rename tensors")
        self.stem, self.n_layers = blocks[0][1], 1 + max(int(match[2]) for match in blocks)
        block_tensors = {match[3]: self.tensors[match[0]] for match in blocks if match[2] == "0"}
        if not block_tensors:
            raise InputError(f"{source.path}: missing: {self.stem}.0.…")
        self.block_tensors = dict(sorted(block_tensors.items(), key=lambda item: _numeric_key(item[0])))
        top = {name: tensor for name, tensor in self.tensors.items() if not _BLOCK.fullmatch(name)}
        self.top = {part: names[0] for part, names in _find_parts(top, _TOP_PATTERNS).items()}
        if "embed" not in self.top:
            raise InputError(f"{source.path}: missing: embed.weight")
        self.vocab_size, self.d_model = shape_of(source, self.tensors, self.top["embed"], 2)
        self.n_banks = self._n_banks()
        self.parts = _find_parts(self.block_tensors, _BLOCK_PATTERNS)
        _add_by_shape(self.block_tensors, self.d_model, self.parts)
        self.tied = tied_duplicates(self.tensors, self.top["embed"], self.top.get("unembed", ""))
        self.names: dict[str, Theirs] = {}
        self.inferred: dict[str, Any] = {"family": "routed"}

    def read(self) -> None:
        self._top()
        self._norms()
        self._convolutions()
        self._state()
        self._attention()
        self._dense()
        self._router()
        self.inferred["pathways"] = self._pathways()
        self._apply_file_config()

    def _top(self) -> None:
        self.inferred |= {"vocab_size": self.vocab_size, "d_model": self.d_model, "n_layers": self.n_layers,
                          "tie_embeddings": "unembed" not in self.top or bool(self.tied),
                          "abstain_head": "abstain" in self.top,
                          "positions": "learned" if "positions" in self.top else "none"}
        self.names["embed.kernel"] = Theirs(self.top["embed"])
        for part, ours in (("unembed", "unembed.kernel"), ("abstain", "abstain.kernel")):
            if part in self.top:
                self.names[ours] = transposed(self.top[part])
        if "abstain" in self.top:
            self.names["abstain.bias"] = Theirs("abstain.bias")
        if "positions" in self.top:
            self.names["positions.table"] = Theirs(self.top["positions"])
            self.inferred["max_seq_len"] = self.tensors[self.top["positions"]].shape[0]
        elif "max_seq_len" in self.source.config:
            self.inferred["max_seq_len"] = self.source.config["max_seq_len"]
        norm = self.top.get("final_norm", "final_norm.weight").removesuffix(".weight")
        self.names |= {"final_norm.scale": Theirs(f"{norm}.weight"),
                       "final_norm.bias": Theirs(f"{norm}.bias")}

    def _norms(self) -> None:
        norms = sorted((name.removesuffix(".weight") for name in self.parts.get("norm", ["norm.weight"])),
                       key=_numeric_key)
        self.inferred["second_norm"] = "none"
        if len(norms) > 1:
            hints = {kind for kind, hint in (("dense", "dense|ffn|mlp"), ("mix", "mix|post"))
                     if any(re.search(hint, norm) for norm in norms)}
            if len(hints) == 1:
                self.inferred["second_norm"] = hints.pop()
                norms.sort(key=lambda norm: bool(re.search("dense|ffn|mlp|mix|post", norm)))
            elif "second_norm" not in map(key_of, self.overrides):
                raise cannot_infer(self.source, "second_norm")
        for ours, norm in zip(("norm", "norm2"), norms, strict=False):
            self._add_name(f"{ours}.scale", Theirs(f"{norm}.weight"))
            self._add_name(f"{ours}.bias", Theirs(f"{norm}.bias"))

    def _convolutions(self) -> None:
        kernels = self.parts.get("conv", [])
        sizes = sorted({self.block_tensors[name].shape[2] for name in kernels})
        pathway_of = {name: "wide" if "wide" in name else "local" for name in kernels
                      if ("wide" in name) != ("local" in name)}
        for name in kernels:  # if the name does not say which, the longer of two kernels is wide
            longest = len(sizes) > 1 and self.block_tensors[name].shape[2] == sizes[-1]
            pathway_of.setdefault(name, "wide" if longest else "local")
        for pathway in ("local", "wide"):
            names = [name for name in kernels if pathway_of[name] == pathway]
            if names:
                self.inferred[f"{pathway}_kernel"] = self.block_tensors[names[0]].shape[2]
            for bank, name in self._banked(pathway, names):
                self._add_name(f"{bank}.kernel", Theirs(name, "taps"))
                bias = f"{name.removesuffix('.weight')}.bias"
                if bias in self.block_tensors:
                    self.inferred["conv_bias"] = True
                    self._add_name(f"{bank}.bias", Theirs(bias))

    def _state(self) -> None:
        for part in ("a_raw", "b", "c"):
            for bank, name in self._banked("state", self.parts.get(part, [])):
                self._add_name(f"{bank}.{part}", Theirs(name))

    def _attention(self) -> None:
        if "query" not in self.parts:
            return
        values = self.parts.get("value", [])
        per_bank = max(1, len(values) // self.n_banks)
        n_heads = per_bank if per_bank > 1 else max(1, self.block_tensors[values[0]].shape[0] // self.d_model
                                                    if values else 1)
        rows = self.block_tensors[self.parts["query"][0]].shape[0]
        heads_apart = len(self.parts["query"]) // self.n_banks > 1
        self.inferred |= {"n_heads": n_heads, "d_head": rows if heads_apart else rows // n_heads}
        for part in ("query", "key", "value"):
            for bank, name in self._banked("sparse", self.parts.get(part, [])):
                self._add_name(f"{bank}.{part}.kernel",
                               transposed(name) if "{h}" in name else Theirs(name, "fused heads"))

    def _dense(self) -> None:
        for part in ("up", "down"):
            for bank, name in self._banked("dense", self.parts.get(part, [])):
                self._add_name(f"{bank}.{part}.kernel", transposed(name))
        if "up" in self.parts:
            self.inferred["dense_expand"] = self.block_tensors[self.parts["up"][0]].shape[0] // self.d_model

    def _router(self) -> None:
        for name in self.parts.get("router", ["router.weight"])[:1]:
            self._add_name("router.kernel", transposed(name))
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias in self.block_tensors:
                self.inferred["router_bias"] = True
                self._add_name("router.bias", Theirs(bias))

    def _apply_file_config(self) -> None:
        """Adds settings from the file's configuration; raises InputError if it contradicts the tensors."""
        tree = self.source.config
        for ours in ("vocab_size", "d_model", "n_layers", "n_heads", "d_head", "dense_expand",
                     "local_kernel"):
            theirs = _FILE_KEYS.get(ours, ours)
            if theirs in tree and ours in self.inferred and tree[theirs] != self.inferred[ours]:
                raise InputError(f"{self.source.path}: configuration: {theirs}: expected "
                                 f"{self.inferred[ours]}, the value in the tensors, found {tree[theirs]!r}")
        for key in ("top_k", "head_reduction"):
            if key in tree:
                self.inferred[key] = tree[key]
        self.inferred |= {"n_banks": self.n_banks, **quantizer_setting(self.source)}

    def _pathways(self) -> list[str]:
        """Pathways in the router's order: by the numbers in their names, or else the default order."""
        pathways = [name for name in _PATHWAY_ORDER
                    if any(f"blocks.{{i}}.{name}." in ours for ours in self.names)]
        first_names = {name: next(place.name for ours, place in self.names.items()
                                  if f"blocks.{{i}}.{name}." in ours) for name in pathways}
        numbers = {name: re.match(r"(\w+\.\{i\}\.[a-zA-Z_]+)\.(\d+)\.", theirs)
                   for name, theirs in first_names.items()}
        matches = [match for match in numbers.values() if match]
        if len(matches) == len(pathways) > 1 and len({match[1] for match in matches}) == 1 and (
                len({match[2] for match in matches}) == len(pathways)):
            pathways.sort(key=lambda name: int(numbers[name][2]))  # type: ignore[index]
        return pathways

    def _n_banks(self) -> int:
        config = configured(RoutedConfig, {"n_banks": self.source.config.get("n_banks", 1)},
                            [text for text in self.overrides if key_of(text) == "n_banks"],
                            str(self.source.path))
        return int(config.n_banks)

    def _banked(self, pathway: str, names: list[str]) -> Iterable[tuple[str, str]]:
        """Yields our name and the file's name of the pathway for each bank, with `{h}` for separate heads."""
        n_banks = self.n_banks
        per_bank = len(names) // n_banks
        for bank in range(n_banks if names else 0):
            bank_names = names[bank * per_bank:(bank + 1) * per_bank]
            try:
                yield pathway if bank == 0 else f"{pathway}_{bank}", _common_pattern(bank_names)
            except (ValueError, IndexError):
                raise InputError(
                    f"{self.source.path}: cannot infer the order of {', '.join(names)}; rename them with "
                    "--map, or give the number of banks with --set n_banks=N") from None

    def _add_name(self, ours: str, theirs: Theirs) -> None:
        name = f"{self.stem}.{{i}}.{theirs.name}"
        self.names[f"blocks.{{i}}.{ours}"] = Theirs(name, theirs.how)


def names_of(config: RoutedConfig) -> Names:
    """Names in a `.pt` file without a conversion record: those of atome's files."""
    names = {"embed.kernel": Theirs("embed.weight"), "positions.table": Theirs("pos_embed.weight"),
             "final_norm.scale": Theirs("final_norm.weight"), "final_norm.bias": Theirs("final_norm.bias"),
             "unembed.kernel": transposed("unembed.weight"), "abstain.kernel": transposed("abstain.weight"),
             "abstain.bias": Theirs("abstain.bias")}
    block = "blocks.{i}."
    for norm in ("norm", "norm2"):
        theirs = "norm" if norm == "norm" else f"norm_{config.second_norm}"
        names |= {f"{block}{norm}.scale": Theirs(f"{block}{theirs}.weight"),
                  f"{block}{norm}.bias": Theirs(f"{block}{theirs}.bias")}
    names |= {f"{block}router.kernel": transposed(f"{block}router.proj.weight"),
              f"{block}router.bias": Theirs(f"{block}router.proj.bias")}
    head = "heads.{h}." if config.n_heads > 1 else ""
    for bank in range(config.n_banks):
        ours, theirs = ("", "") if bank == 0 else (f"_{bank}", f"{bank}.")
        for conv in ("local", "wide"):
            names |= {f"{block}{conv}{ours}.kernel": Theirs(f"{block}{conv}.{theirs}weight", "taps"),
                      f"{block}{conv}{ours}.bias": Theirs(f"{block}{conv}.{theirs}bias")}
        names |= {f"{block}state{ours}.{part}": Theirs(f"{block}state.{theirs}{letter}")
                  for part, letter in (("a_raw", "a_raw"), ("b", "b"), ("c", "c_out"))}
        for part, letter in (("query", "Wq"), ("key", "Wk"), ("value", "Wv")):
            name = f"{block}sparse.{theirs}{head}{letter}.weight"
            names[f"{block}sparse{ours}.{part}.kernel"] = (
                transposed(name) if head else Theirs(name, "fused heads"))
        names |= {f"{block}dense{ours}.{part}.kernel": transposed(f"{block}dense.{theirs}{part}.weight")
                  for part in ("up", "down")}
    return names


def _plan(source: Source, overrides: Sequence[str], family: str, defaults: Mapping[str, Any]) -> Plan:
    source = stripped(source)
    if has_library_settings(source, "routed"):
        config = configured(RoutedConfig, library_settings(RoutedConfig, source), overrides, str(source.path))
        return make_plan(family, RoutedLM, config, names_of(config), source, {})
    layout = _Layout(source, overrides)
    layout.read()
    inferred = {**defaults, **layout.inferred}
    known = {*inferred, *map(key_of, overrides)}
    for key in ("top_k", "quantizer"):
        needed = key != "top_k" or "sparse" in inferred["pathways"]
        if key not in known and needed:
            raise cannot_infer(source, key)
    config = configured(RoutedConfig, inferred, overrides, str(source.path))
    assumptions = quantized_parts(config, known)
    several_heads = "sparse" in config.pathways and config.n_heads > 1
    if several_heads and "head_reduction" not in known:
        assumptions.append(Assumption("head_reduction", "mean", ("sum",), "the source does not specify "
                                      "whether heads are averaged or summed; mean is assumed"))
    return make_plan(family, RoutedLM, config, layout.names, source, {}, assumptions, layout.tied)


def _is_routed(source: Source) -> bool:
    if source.is_directory:
        return False
    blocks = {match[3]: source.tensors[name] for name in source.tensors if (match := _BLOCK.search(name))}
    return has_library_settings(source, "routed") or "router" in _find_parts(blocks, _BLOCK_PATTERNS)


def _is_atome(source: Source) -> bool:
    return _is_routed(source) and "n_pathways" in source.config and not any(
        re.search(r"\.(up|down)\.weight$", name) for name in source.tensors)


# atome quantises all its matrix products; its files do not record this.
_ATOME = {"quantizer": "ternary", "quantize": ["conv", "attention", "router", "embed", "unembed"]}
TILELLI = SourceFamily("tilelli", _is_routed,
                 lambda source, overrides: _plan(source, overrides, "tilelli", {}))
ATOME = SourceFamily("atome", _is_atome,
               lambda source, overrides: _plan(source, overrides, "atome", _ATOME))
