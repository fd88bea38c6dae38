"""Tilelli's routed networks in `.pt` files, whose names are published only in part.

So a tensor is known by the end of its name and by its shape: `blocks.3.sparse.heads.5.Wq.weight`,
`blocks.3.paths.1.Wq.weight` and `blocks.3.attn.q_proj.weight` are all queries, of one head or of
several fused. What a block has is read off block 0; the other blocks must have the same. What no
tensor can tell (top_k, the quantiser, …) comes from the file's configuration or from `--set`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.models.routed import RoutedConfig, RoutedLM
from tilelli_jax.pretrained.mapping import Names, Theirs, turned
from tilelli_jax.tensors import Tensor

from ..plan import Assumption, Family, Plan, configured, make_plan
from ..source import Source
from .stated import (
    cannot_be_told,
    is_ours,
    our_settings,
    quantized_parts,
    quantizer_of,
    stripped,
    tied_twice,
)

_BLOCK = re.compile(r"(blocks|layers|h)\.(\d+)\.(.+)")
_TOP: dict[str, tuple[str, int]] = {  # part → how its name ends, number of axes
    "embed": (r"(tok_?|token_)?(embed(ding)?|emb|wte)(\.weight)?", 2),
    "positions": (r"(pos_?(embed(ding)?|emb)?|position_embed(ding)?s?|positions|wpe)(\.weight)?", 2),
    "final_norm": (r"(final_norm|norm_final|norm_f|ln_f|norm)\.weight", 1),
    "unembed": (r"(unembed|lm_head|head|out)\.weight", 2), "abstain": (r"abstain\.weight", 2)}
_PARTS: dict[str, tuple[str, int]] = {
    "query": (r"(W_?q|q_proj|query|q)(\.weight)?", 2), "key": (r"(W_?k|k_proj|key|k)(\.weight)?", 2),
    "value": (r"(W_?v|v_proj|value|v)(\.weight)?", 2),
    "router": (r"(router|gate)(\.\w+)?\.weight", 2), "up": (r"(up|up_proj|w1|fc1)(\.weight)?", 2),
    "down": (r"(down|down_proj|w2|fc2)(\.weight)?", 2), "a_raw": ("a_raw", 1), "b": ("b", 1),
    "c": (r"c(_out)?", 1), "norm": (r"\w*(norm|ln)\w*\.weight", 1)}
_ORDER = ("local", "wide", "state", "sparse", "dense")  # of pathways, in the router
_SAID_AS = {"local_kernel": "kernel_size"}  # of our settings, what their configuration calls them


def _inventory(names: Mapping[str, Tensor], parts: Mapping[str, tuple[str, int]]) -> dict[str, list[str]]:
    """Which names are which part, in the order of the file."""
    found: dict[str, list[str]] = {}
    for name, tensor in names.items():
        for part, (ending, rank) in parts.items():
            if len(tensor.shape) == rank and re.search(rf"(^|\.){ending}$", name):
                found.setdefault(part, []).append(name)
                break
    return found


def _natural(name: str) -> list[Any]:
    """Numbers by their size: heads.2 before heads.10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def _by_shape(inside: Mapping[str, Tensor], d_model: int, found: dict[str, list[str]]) -> None:
    """Adds what only a shape tells: convolutions, and feed-forward weights without names."""
    known = {name for names in found.values() for name in names}
    for name, tensor in inside.items():
        shape = tensor.shape
        if len(shape) == 3 and shape[:2] == (d_model, 1):
            found.setdefault("conv", []).append(name)
        elif len(shape) == 2 and name not in known and shape[0] != shape[1] and d_model in shape:
            part = "up" if shape[1] == d_model else "down"
            found.setdefault(part, []).append(name)


def _pattern(names: list[str]) -> str:
    """The one name that all are, with `{h}` for the number that counts them up from 0.

    Raises:
        ValueError: there is no such number.
    """
    if len(names) == 1:
        return names[0]
    pieces = [re.split(r"(\d+)", name) for name in names]
    if len({len(piece) for piece in pieces}) == 1:
        differing = [i for i, column in enumerate(zip(*pieces, strict=True)) if len(set(column)) > 1]
        counted = set(map(str, range(len(names))))
        if len(differing) == 1 and {piece[differing[0]] for piece in pieces} == counted:
            piece = list(pieces[0])
            piece[differing[0]] = "{h}"
            return "".join(piece)
    raise ValueError


class _Layout:
    """What block 0 has, as settings and as names."""

    def __init__(self, source: Source, settings: Mapping[str, Any]) -> None:
        self.source, self.settings = source, settings
        self.tensors = source.tensors
        blocks = [match for match in map(_BLOCK.fullmatch, self.tensors) if match]
        if not blocks:
            raise InputError(f"{source.path}: no tensor is called blocks.0.…; a --map may rename them")
        self.stem, self.n_layers = blocks[0][1], 1 + max(int(match[2]) for match in blocks)
        inside = {match[3]: self.tensors[match[0]] for match in blocks if match[2] == "0"}
        if not inside:
            raise InputError(f"{source.path}: missing: {self.stem}.0.…")
        self.inside = dict(sorted(inside.items(), key=lambda item: _natural(item[0])))
        top = {name: tensor for name, tensor in self.tensors.items() if not _BLOCK.fullmatch(name)}
        self.top = {part: names[0] for part, names in _inventory(top, _TOP).items()}
        if "embed" not in self.top:
            raise InputError(f"{source.path}: missing: embed.weight")
        self.vocab_size, self.d_model = self.tensors[self.top["embed"]].shape
        self.n_banks = self._n_banks()
        self.parts = _inventory(self.inside, _PARTS)
        _by_shape(self.inside, self.d_model, self.parts)
        self.doubled = tied_twice(self.tensors, self.top["embed"], self.top.get("unembed", ""))
        self.names: dict[str, Theirs] = {}
        self.said: dict[str, Any] = {"family": "routed"}

    def read(self) -> None:
        self._top()
        self._norms()
        self._convolutions()
        self._state()
        self._attention()
        self._dense()
        self._router()
        self.said["pathways"] = self._pathways()
        self._stated()

    def _top(self) -> None:
        self.said |= {"vocab_size": self.vocab_size, "d_model": self.d_model, "n_layers": self.n_layers,
                      "tie_embeddings": "unembed" not in self.top or bool(self.doubled),
                      "abstain_head": "abstain" in self.top,
                      "positions": "learned" if "positions" in self.top else "none"}
        self.names["embed.kernel"] = Theirs(self.top["embed"])
        for part, ours in (("unembed", "unembed.kernel"), ("abstain", "abstain.kernel")):
            if part in self.top:
                self.names[ours] = turned(self.top[part])
        if "abstain" in self.top:
            self.names["abstain.bias"] = Theirs("abstain.bias")
        if "positions" in self.top:
            self.names["positions.table"] = Theirs(self.top["positions"])
            self.said["max_seq_len"] = self.tensors[self.top["positions"]].shape[0]
        elif "max_seq_len" in self.source.tree:
            self.said["max_seq_len"] = self.source.tree["max_seq_len"]
        norm = self.top.get("final_norm", "final_norm.weight").removesuffix(".weight")
        self.names |= {"final_norm.scale": Theirs(f"{norm}.weight"),
                       "final_norm.bias": Theirs(f"{norm}.bias")}

    def _norms(self) -> None:
        norms = sorted((name.removesuffix(".weight") for name in self.parts.get("norm", ["norm.weight"])),
                       key=_natural)
        self.said["second_norm"] = "none"
        if len(norms) > 1:
            hints = {kind for kind, hint in (("dense", "dense|ffn|mlp"), ("mix", "mix|post"))
                     if any(re.search(hint, norm) for norm in norms)}
            if len(hints) == 1:
                self.said["second_norm"] = hints.pop()
                norms.sort(key=lambda norm: bool(re.search("dense|ffn|mlp|mix|post", norm)))
            elif "second_norm" not in self.settings:
                raise cannot_be_told(self.source, "second_norm")
        for ours, norm in zip(("norm", "norm2"), norms, strict=False):
            self._put(f"{ours}.scale", Theirs(f"{norm}.weight"))
            self._put(f"{ours}.bias", Theirs(f"{norm}.bias"))

    def _convolutions(self) -> None:
        found = self.parts.get("conv", [])
        sizes = sorted({self.inside[name].shape[2] for name in found})
        said = {name: "wide" if "wide" in name else "local" for name in found
                if ("wide" in name) != ("local" in name)}
        for name in found:  # where no name says it, the longer of two is the wide one
            said.setdefault(name, "wide" if len(sizes) > 1 and self.inside[name].shape[2] == sizes[-1]
                            else "local")
        for pathway in ("local", "wide"):
            names = [name for name in found if said[name] == pathway]
            if names:
                self.said[f"{pathway}_kernel"] = self.inside[names[0]].shape[2]
            for bank, name in self._banked(pathway, names):
                self._put(f"{bank}.kernel", Theirs(name, "taps"))
                bias = f"{name.removesuffix('.weight')}.bias"
                if bias in self.inside:
                    self.said["conv_bias"] = True
                    self._put(f"{bank}.bias", Theirs(bias))

    def _state(self) -> None:
        for part in ("a_raw", "b", "c"):
            for bank, name in self._banked("state", self.parts.get(part, [])):
                self._put(f"{bank}.{part}", Theirs(name))

    def _attention(self) -> None:
        if "query" not in self.parts:
            return
        values = self.parts.get("value", [])
        per_bank = max(1, len(values) // self.n_banks)
        n_heads = per_bank if per_bank > 1 else max(1, self.inside[values[0]].shape[0] // self.d_model
                                                    if values else 1)
        rows = self.inside[self.parts["query"][0]].shape[0]
        split = len(self.parts["query"]) // self.n_banks > 1
        self.said |= {"n_heads": n_heads, "d_head": rows if split else rows // n_heads}
        for part in ("query", "key", "value"):
            for bank, name in self._banked("sparse", self.parts.get(part, [])):
                self._put(f"{bank}.{part}.kernel",
                          turned(name) if "{h}" in name else Theirs(name, "fused heads"))

    def _dense(self) -> None:
        for part in ("up", "down"):
            for bank, name in self._banked("dense", self.parts.get(part, [])):
                self._put(f"{bank}.{part}.kernel", turned(name))
        if "up" in self.parts:
            self.said["dense_expand"] = self.inside[self.parts["up"][0]].shape[0] // self.d_model

    def _router(self) -> None:
        for name in self.parts.get("router", ["router.weight"])[:1]:
            self._put("router.kernel", turned(name))
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias in self.inside:
                self.said["router_bias"] = True
                self._put("router.bias", Theirs(bias))

    def _stated(self) -> None:
        """What the file's configuration adds, and what it must not contradict."""
        tree = self.source.tree
        for ours in ("vocab_size", "d_model", "n_layers", "n_heads", "d_head", "dense_expand",
                     "local_kernel"):
            theirs = _SAID_AS.get(ours, ours)
            if theirs in tree and ours in self.said and tree[theirs] != self.said[ours]:
                raise InputError(f"{self.source.path}: its configuration says {theirs} {tree[theirs]!r}, its "
                                 f"tensors {self.said[ours]}")
        for key in ("top_k", "head_reduction"):
            if key in tree:
                self.said[key] = tree[key]
        self.said |= {"n_banks": self.n_banks, **quantizer_of(self.source)}

    def _pathways(self) -> list[str]:
        """In the router's order: by the numbers that they are called by, or else as it always is."""
        found = [name for name in _ORDER if any(f"blocks.{{i}}.{name}." in ours for ours in self.names)]
        first = {name: next(place.name for ours, place in self.names.items()
                            if f"blocks.{{i}}.{name}." in ours) for name in found}
        numbers = {name: re.match(r"(\w+\.\{i\}\.[a-zA-Z_]+)\.(\d+)\.", theirs)
                   for name, theirs in first.items()}
        matches = [match for match in numbers.values() if match]
        if len(matches) == len(found) > 1 and len({match[1] for match in matches}) == 1 and (
                len({match[2] for match in matches}) == len(found)):
            found.sort(key=lambda name: int(numbers[name][2]))  # type: ignore[index]
        return found

    def _n_banks(self) -> int:
        n = self.settings.get("n_banks", self.source.tree.get("n_banks", 1))
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"{self.source.path}: n_banks: expected a whole number ≥ 1, found {n!r}")
        return n

    def _banked(self, pathway: str, names: list[str]) -> Iterable[tuple[str, str]]:
        """For each bank what we call the pathway, and the name, with `{h}` where heads are apart."""
        n_banks = self.n_banks
        each = len(names) // n_banks
        for bank in range(n_banks if names else 0):
            mine = names[bank * each:(bank + 1) * each]
            try:
                yield pathway if bank == 0 else f"{pathway}_{bank}", _pattern(mine)
            except (ValueError, IndexError):
                raise InputError(
                    f"{self.source.path}: cannot tell which of {', '.join(names)} is which; a --map may "
                    "rename them, --set n_banks=N say how many banks there are") from None

    def _put(self, ours: str, theirs: Theirs) -> None:
        name = f"{self.stem}.{{i}}.{theirs.name}"
        self.names[f"blocks.{{i}}.{ours}"] = Theirs(name, theirs.how)


def names_of(config: RoutedConfig) -> Names:
    """What we call everything in a `.pt` file where no original says how: as atome's files do."""
    names = {"embed.kernel": Theirs("embed.weight"), "positions.table": Theirs("pos_embed.weight"),
             "final_norm.scale": Theirs("final_norm.weight"), "final_norm.bias": Theirs("final_norm.bias"),
             "unembed.kernel": turned("unembed.weight"), "abstain.kernel": turned("abstain.weight"),
             "abstain.bias": Theirs("abstain.bias")}
    block = "blocks.{i}."
    for norm in ("norm", "norm2"):
        theirs = "norm" if norm == "norm" else f"norm_{config.second_norm}"
        names |= {f"{block}{norm}.scale": Theirs(f"{block}{theirs}.weight"),
                  f"{block}{norm}.bias": Theirs(f"{block}{theirs}.bias")}
    names |= {f"{block}router.kernel": turned(f"{block}router.proj.weight"),
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
                turned(name) if head else Theirs(name, "fused heads"))
        names |= {f"{block}dense{ours}.{part}.kernel": turned(f"{block}dense.{theirs}{part}.weight")
                  for part in ("up", "down")}
    return names


def _plan(source: Source, settings: Mapping[str, Any], family: str, defaults: Mapping[str, Any]) -> Plan:
    source = stripped(source)
    if is_ours(source, "routed"):
        config = configured(RoutedConfig, our_settings(RoutedConfig, source), settings, str(source.path))
        return make_plan(family, RoutedLM, config, names_of(config), source, {})
    layout = _Layout(source, settings)
    layout.read()
    said = {**defaults, **layout.said}
    for key in ("top_k", "quantizer"):
        if key not in said and key not in settings and (key != "top_k" or "sparse" in said["pathways"]):
            raise cannot_be_told(source, key)
    config = configured(RoutedConfig, said, settings, str(source.path))
    assumptions = quantized_parts(config, {**said, **settings})
    if "sparse" in config.pathways and config.n_heads > 1 and "head_reduction" not in {**said, **settings}:
        assumptions.append(Assumption("head_reduction", "mean", ("sum",), "nothing says whether heads are "
                                      "averaged or summed; mean is assumed"))
    return make_plan(family, RoutedLM, config, layout.names, source, {}, assumptions, layout.doubled)


def _is_routed(source: Source) -> bool:
    if source.is_directory:
        return False
    blocks = {match[3]: source.tensors[name] for name in source.tensors if (match := _BLOCK.search(name))}
    return is_ours(source, "routed") or "router" in _inventory(blocks, _PARTS)


def _is_atome(source: Source) -> bool:
    return _is_routed(source) and "n_pathways" in source.tree and not any(
        re.search(r"\.(up|down)\.weight$", name) for name in source.tensors)


# atome quantises all its products; its files do not say so.
_ATOME = {"quantizer": "ternary", "quantize": ["conv", "attention", "router", "embed", "unembed"]}
TILELLI = Family("tilelli", _is_routed,
                 lambda source, settings: _plan(source, settings, "tilelli", {}))
ATOME = Family("atome", _is_atome,
               lambda source, settings: _plan(source, settings, "atome", _ATOME))
