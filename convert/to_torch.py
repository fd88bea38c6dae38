"""Converts model directories back to Hugging Face directories and `.pt` files.

`_output_format` decides what is written. `_layout` decides how a `.pt` file holds the network: as the record
of its conversion says, or by the family's defaults.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import as_json, new_directory, write_together
from tilelli_jax.io.json_text import as_expected, read_json
from tilelli_jax.io.tensors import Tensor, check_fit, check_floats
from tilelli_jax.loading import store
from tilelli_jax.models.arrays import check_sizes
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.pretrained import hugging_face, mapping
from tilelli_jax.pretrained.mapping import Names, Theirs

from . import checkpoint, to_saelens
from .families import lrd, sae_layouts, tilelli, vanilla
from .families.common import PARTS
from .plan import Plan, shapes
from .source import Source, companions_of, lexists, read_companions

SUFFIXES = (".pt", ".pth")
RECORD = "conversion.json"  # written into a converted model directory; used to convert it back
Target = Literal["torch", "hf", "saelens", "sparsify"]  # of --to
Format = Literal["hugging_face", "pt", "saelens", "sparsify"]


def record(source: Source, plan: Plan) -> dict[str, Any]:
    """Returns the contents of `RECORD`: what converting back needs to know about the source."""
    return {"source": source.path.name, "family": plan.family, "state_key": source.state_key,
            "config_key": source.config_key, "config": source.config, "other_entries": source.other_entries,
            "names": {ours: [theirs.name, theirs.how] for ours, theirs in plan.names.items()},
            "original_names": {name: original for name, original in plan.original_names.items()
                               if original != name},
            "tied_duplicates": dict(plan.tied_duplicates), "model_config": config_lib.to_dict(plan.config)}


def write(config: Any, arrays: Mapping[str, Tensor], source: Path, out: Path, to: Target = "torch") -> None:
    """Converts a model directory back and writes the checkpoint.

    Args:
        config: configuration of the model.
        arrays: arrays of the model directory.
        source: the model directory, whose record and companion files are used.
        out: path of the checkpoint.
        to: "torch"; "hf" for networks of transformers; "saelens" or "sparsify" for autoencoders.

    Raises:
        InputError: the arrays do not fit the configuration or are not floating-point; `out` already exists,
            has the wrong suffix, or cannot be written.
    """
    network: Any = store.FAMILIES[config.family][1]
    shapes_found = {name: array.shape for name, array in arrays.items()}
    check_sizes(config, shapes_found, str(source))
    check_fit(shapes(network, config), shapes_found, str(source))
    check_floats(arrays, str(source))
    match _output_format(config, out, to, str(source)):
        case "saelens" | "sparsify":
            to_saelens.write_directory(to, config, arrays, out)
        case "hugging_face":
            saved = _read_record(source, config)
            others = read_companions(companions_of(source))
            with new_directory(out) as path:
                hugging_face.write(network.hugging_face, config, arrays, path, others=others,
                                   original_config=saved and saved["config"])
        case "pt":
            saved = _read_record(source, config)
            try:
                with as_expected(source / RECORD) if saved else contextlib.nullcontext():
                    tree = _tree(config, arrays, _layout(config, saved), str(source))
                content = checkpoint.writer(out, tree)
                out.parent.mkdir(parents=True, exist_ok=True)
                write_together({out: content})
            except OSError as error:
                raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


def _output_format(config: Any, out: Path, to: Target, source: str) -> Format:
    """Decides what is written, and rejects what cannot be.

    | --to              | network             | output                      |
    |-------------------|---------------------|-----------------------------|
    | saelens, sparsify | an autoencoder      | a directory of that library |
    | torch, hf         | one of transformers | a Hugging Face directory    |
    | torch             | any other           | a .pt file                  |
    """
    if config.family == "sae" and to != "saelens":
        for key, value in (("activation", "topk"), ("input_norm", "none")):
            if getattr(config, key) != value:
                raise InputError(f"--to {to}: {source}: {key}: expected {value}, found "
                                 f"{getattr(config, key)}, which only --to saelens can write")
    if to == "saelens" or to == "sparsify":
        if config.family != "sae":
            raise InputError(f"--to {to}: {source}: expected an autoencoder, found a {config.family}")
        return to
    network = store.FAMILIES[config.family][1]
    if isinstance(network, type) and issubclass(network, PretrainedModel):
        if out.suffix in SUFFIXES:
            raise InputError(f"{out}: expected a directory, as transformers requires for a {config.family}")
        return "hugging_face"
    if to == "hf":
        raise InputError(f"--to hf: {source}: expected a network that transformers has, "
                         f"found a {config.family}")
    if out.exists():
        raise InputError(f"{out}: already exists; choose another OUT")
    if out.suffix not in SUFFIXES:
        raise InputError(f"{out}: expected a file name that ends in .pt")
    return "pt"


def _read_record(source: Path, config: Any) -> dict[str, Any] | None:
    """The record of a model directory; None if it has none, or another network than the converted one.

    Raises:
        InputError: the file does not have the format of `record`.
    """
    path = source / RECORD
    if not lexists(path):
        return None
    saved = read_json(path)
    expected_types = {"state_key": str, "config_key": str, "config": dict, "other_entries": dict,
                      "names": dict, "original_names": dict, "tied_duplicates": dict, "model_config": dict}
    valid = all(isinstance(saved.get(key), kind) for key, kind in expected_types.items()) and all(
        isinstance(place, list) and len(place) == 2 and all(isinstance(part, str) for part in place)
        and place[1] in mapping.LAYOUTS for place in saved["names"].values()) and all(
        isinstance(name, str)
        for key in ("original_names", "tied_duplicates") for name in saved[key].values())
    if not valid:
        raise InputError(f"{path}: expected a record written by `tilelli convert`; without this file "
                         "the tensors get default names")
    current = json.loads(as_json(config_lib.to_dict(config)))
    return saved if saved["model_config"] == current else None


class FileLayout(NamedTuple):
    """How a `.pt` file holds a network.

    Attributes:
        names: tensor of each array.
        state_key: the entry that holds the tensors; "": the file holds them itself.
        entries: the other entries.
        original_names: name by `names` → name in the file, where they differ.
        tied_duplicates: tensors stored twice: name → name of the identical tensor.
    """

    names: Names
    state_key: str
    entries: Mapping[str, Any]
    original_names: Mapping[str, str] = {}
    tied_duplicates: Mapping[str, str] = {}


def _layout(config: Any, saved: Mapping[str, Any] | None) -> FileLayout:
    """The layout of the file that was converted, if there is a record, else the family's."""
    config_entry = {} if config.family in ("sae", "lrd") else {"config": _config_tree(config)}
    if saved is None:
        fixed_names: dict[str, Any] = {"vanilla": vanilla.NAMES, "sae": sae_layouts.NAMES, "lrd": lrd.NAMES}
        names = (fixed_names[config.family] if config.family in fixed_names else tilelli.names_of(config))
        return FileLayout(names, "" if config.family == "sae" else "state_dict", config_entry)
    if saved["config_key"] and config.family != "lrd":
        config_entry = {saved["config_key"]: saved["config"]}
    return FileLayout({ours: Theirs(name, how) for ours, (name, how) in saved["names"].items()},
                  saved["state_key"], config_entry | saved["other_entries"], saved["original_names"],
                  saved["tied_duplicates"])


def _tree(config: Any, arrays: Mapping[str, Tensor], layout: FileLayout, source: str) -> dict[str, Any]:
    """The contents of a `.pt` file."""
    links = mapping.link(layout.names, {name: array.shape for name, array in arrays.items()}, source)
    state: dict[str, Any] = mapping.to_theirs(links, arrays)
    state |= {name: state[other] for name, other in layout.tied_duplicates.items()}
    state = {layout.original_names.get(name, name): tensor for name, tensor in state.items()}
    if config.family == "lrd":
        return lrd.tree_of(config, state, layout.entries)
    return {**({layout.state_key: state} if layout.state_key else state), **layout.entries}


def _config_tree(config: Any) -> dict[str, Any]:
    """The configuration in the format of the original repositories, plus the settings that only our
    configuration has.
    """
    tree = config_lib.to_dict(config)
    tree[PARTS] = tree["quantize"]  # their `quantize` says whether to quantise, and how
    tree["quantize"] = config.quantizer != "none" and config.quantizer
    return {key: np.asarray(value).tolist() for key, value in tree.items()}
