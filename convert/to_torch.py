"""Converts model directories back to Hugging Face directories and `.pt` files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import as_json, new_directory, write_together
from tilelli_jax.io.json_text import as_expected, read_json
from tilelli_jax.io.tensors import Tensor, check_fit, check_floats
from tilelli_jax.loading import store
from tilelli_jax.models.arrays import check_sizes
from tilelli_jax.models.from_pretrained import Pretrained
from tilelli_jax.pretrained import hugging_face, mapping
from tilelli_jax.pretrained.mapping import Names, Theirs

from . import checkpoint
from .families import lrd, sae, tilelli, vanilla
from .families.stated import PARTS
from .plan import Plan, shapes
from .source import Source, companions_of, lexists, read_companions

SUFFIXES = (".pt", ".pth")
RECORD = "conversion.json"  # written into a converted model directory; used to convert it back


def record(source: Source, plan: Plan) -> dict[str, Any]:
    """Returns the contents of `RECORD`: what converting back needs to know about the source."""
    return {"source": source.path.name, "family": plan.family, "state_key": source.state_key,
            "config_key": source.config_key, "config": source.config, "other_entries": source.other_entries,
            "names": {ours: [theirs.name, theirs.how] for ours, theirs in plan.names.items()},
            "original_names": {name: original for name, original in plan.original_names.items()
                               if original != name},
            "tied_duplicates": dict(plan.tied_duplicates), "model_config": config_lib.to_dict(plan.config)}


def write(config: Any, arrays: Mapping[str, Tensor], source: Path, out: Path, to: str = "torch") -> None:
    """Converts a model directory back and writes the checkpoint.

    Args:
        config: configuration of the model.
        arrays: arrays of the model directory.
        source: the model directory, whose record and companion files are used.
        out: path of the checkpoint.
        to: "torch"; for autoencoders also "saelens" or "sparsify".

    Raises:
        InputError: the arrays do not fit the configuration or are not floating-point; `out` already exists,
            has the wrong suffix, or cannot be written.
    """
    network = store.FAMILIES[config.family][1]
    shapes_found = {name: array.shape for name, array in arrays.items()}
    check_sizes(config, shapes_found, str(source))
    check_fit(shapes(network, config), shapes_found, str(source))
    check_floats(arrays, str(source))
    if config.family == "sae" and config.activation != "topk" and to != "saelens":
        raise InputError(f"--to {to}: {source}: activation: expected topk, found batch_topk, which only "
                         f"--to saelens can write")
    if to != "torch":
        if config.family != "sae":
            raise InputError(f"--to {to}: {source}: expected an autoencoder, found a {config.family}")
        sae.write_directory(to, config, arrays, out)
        return
    saved = _read_record(source / RECORD) if lexists(source / RECORD) else {}
    current = json.loads(as_json(config_lib.to_dict(config)))
    # Keys that an older record lacks are not compared.
    if {**current, **saved.get("model_config", {})} != current:
        saved = {}  # the converted network has been replaced by another one
    if isinstance(network, type) and issubclass(network, Pretrained):
        if out.suffix in SUFFIXES:
            raise InputError(f"{out}: expected a directory, as transformers requires for a {config.family}")
        others = read_companions(companions_of(source))
        with new_directory(out) as path:
            hugging_face.write(network.hugging_face, config, arrays, path, others=others,
                               beside=saved.get("config"))
        return
    if out.suffix not in SUFFIXES or out.exists():
        raise InputError(f"{out}: already exists; choose another OUT" if out.exists() else
                         f"{out}: expected a file name that ends in .pt")
    try:
        with as_expected(source / RECORD) if saved else contextlib.nullcontext():
            tree = _tree(config, arrays, saved, str(source))
        content = checkpoint.writer(out, tree)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_together({out: content})
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


def _read_record(path: Path) -> dict[str, Any]:
    """Raises InputError if the file does not have the format of `record`."""
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
    return saved


def _tree(config: Any, arrays: Mapping[str, Tensor], saved: Mapping[str, Any], source: str) -> dict[str, Any]:
    links = mapping.link(_names(config, saved), {name: array.shape for name, array in arrays.items()}, source)
    state: dict[str, Any] = mapping.to_theirs(links, arrays)
    state |= {name: state[other] for name, other in saved.get("tied_duplicates", {}).items()}
    original_names = saved.get("original_names", {})
    state = {original_names.get(name, name): tensor for name, tensor in state.items()}
    other_entries = saved.get("other_entries", {})
    if config.family == "lrd":
        return lrd.tree_of(config, state, other_entries)
    if config.family == "sae" and not saved:
        return state
    config_entry = {saved["config_key"]: saved["config"]} if saved.get("config_key") else (
        {} if config.family == "sae" else {"config": _config_tree(config)})
    state_key = saved.get("state_key", "state_dict")
    return {**({state_key: state} if state_key else state), **config_entry, **other_entries}


def _names(config: Any, saved: Mapping[str, Any]) -> Names:
    if saved:
        return {ours: Theirs(name, how) for ours, (name, how) in saved["names"].items()}
    fixed_names: dict[str, Any] = {"vanilla": vanilla.NAMES, "sae": sae.NAMES, "lrd": lrd.NAMES}
    return fixed_names[config.family] if config.family in fixed_names else tilelli.names_of(config)


def _config_tree(config: Any) -> dict[str, Any]:
    """The configuration in the originals' format, plus the settings that only our configuration has."""
    tree = config_lib.to_dict(config)
    tree[PARTS] = tree["quantize"]  # the originals' `quantize` says whether to quantise, and how
    tree["quantize"] = config.quantizer != "none" and config.quantizer
    return {key: np.asarray(value).tolist() for key, value in tree.items()}
