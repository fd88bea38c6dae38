"""Model directories back to what PyTorch reads: Hugging Face directories and `.pt` files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.files import as_json, new_directory, write_together
from tilelli_jax.json_text import as_expected, read_json
from tilelli_jax.models.arrays import check_sizes
from tilelli_jax.models.pretrained import Pretrained
from tilelli_jax.pretrained import hugging_face, mapping
from tilelli_jax.pretrained.mapping import Names, Theirs
from tilelli_jax.tensors import Tensor, check_fit, check_floats

from . import checkpoint
from .families import lrd, sae, tilelli, vanilla
from .families.stated import PARTS
from .plan import Plan, shapes
from .source import Source, companions_of, is_there, read_companions

SUFFIXES = (".pt", ".pth")
RECORD = "conversion.json"  # how a model directory was made, for the way back


def record(source: Source, plan: Plan) -> dict[str, Any]:
    """What the way back needs to know of a source."""
    return {"source": source.path.name, "family": plan.family, "state_key": source.state_key,
            "config_key": source.config_key, "config": source.tree, "rest": source.rest,
            "names": {ours: [place.name, place.how] for ours, place in plan.names.items()},
            "called": {name: called for name, called in plan.called.items() if called != name},
            "doubled": dict(plan.doubled), "ours": config_lib.to_dict(plan.config)}


def write(config: Any, arrays: Mapping[str, Tensor], source: Path, out: Path, to: str = "torch") -> None:
    """Writes the checkpoint of a model directory.

    Args:
        arrays: of the model directory.
        source: the model directory, for files that are carried along.
        to: "torch", or of autoencoders "saelens" or "sparsify".

    Raises:
        InputError: the arrays are not those of the configuration, or no floating-point numbers; `out`
            already exists, or of the wrong kind, or cannot be written.
    """
    network = store.FAMILIES[config.family][1]
    found = {name: array.shape for name, array in arrays.items()}
    check_sizes(config, found, str(source))
    check_fit(shapes(network, config), found, str(source))
    check_floats(arrays, str(source))
    if config.family == "sae" and config.activation != "topk" and to != "saelens":
        raise InputError(f"--to {to}: {source}: activation: expected topk, found batch_topk, for which only "
                         f"--to saelens has a place")
    if to != "torch":
        if config.family != "sae":
            raise InputError(f"--to {to}: {source}: expected an autoencoder, found a {config.family}")
        sae.write_directory(to, config, arrays, out)
        return
    made = _read_record(source / RECORD) if is_there(source / RECORD) else {}
    ours = json.loads(as_json(config_lib.to_dict(config)))
    if {**ours, **made.get("ours", {})} != ours:  # keys that there were not yet are none that differ
        made = {}  # another network has been put in the place of the one that was converted
    if isinstance(network, type) and issubclass(network, Pretrained):
        if out.suffix in SUFFIXES:
            raise InputError(f"{out}: expected a directory, in which transformers reads a {config.family}")
        others = read_companions(companions_of(source))
        with new_directory(out) as path:
            hugging_face.write(network.hugging_face, config, arrays, path, others=others,
                               beside=made.get("config"))
        return
    if out.suffix not in SUFFIXES or out.exists():
        raise InputError(f"{out}: already exists; choose another OUT" if out.exists() else
                         f"{out}: expected a file name that ends in .pt")
    try:
        with as_expected(source / RECORD) if made else contextlib.nullcontext():
            tree = _tree(config, arrays, made, str(source))
        content = checkpoint.writer(out, tree)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_together({out: content})
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


def _read_record(path: Path) -> dict[str, Any]:
    """Raises InputError where it is not what `record` makes."""
    made = read_json(path)
    kinds = {"state_key": str, "config_key": str, "config": dict, "rest": dict, "names": dict, "called": dict,
             "doubled": dict, "ours": dict}
    fits = all(isinstance(made.get(key), kind) for key, kind in kinds.items()) and all(
        isinstance(place, list) and len(place) == 2 and all(isinstance(part, str) for part in place)
        and place[1] in mapping.LAYOUTS for place in made["names"].values()) and all(
        isinstance(name, str) for key in ("called", "doubled") for name in made[key].values())
    if not fits:
        raise InputError(f"{path}: expected what `tilelli convert` wrote there; without that file the "
                         "tensors get our names")
    return made


def _tree(config: Any, arrays: Mapping[str, Tensor], made: Mapping[str, Any], source: str) -> dict[str, Any]:
    links = mapping.link(_names(config, made), {name: array.shape for name, array in arrays.items()}, source)
    state: dict[str, Any] = mapping.to_theirs(links, arrays)
    state |= {name: state[other] for name, other in made.get("doubled", {}).items()}
    called = made.get("called", {})
    state = {called.get(name, name): tensor for name, tensor in state.items()}
    rest = made.get("rest", {})
    if config.family == "lrd":
        return lrd.tree_of(config, state, rest)
    if config.family == "sae" and not made:
        return state
    kept = {made["config_key"]: made["config"]} if made.get("config_key") else (
        {} if config.family == "sae" else {"config": _said(config)})
    state_key = made.get("state_key", "state_dict")
    return {**({state_key: state} if state_key else state), **kept, **rest}


def _names(config: Any, made: Mapping[str, Any]) -> Names:
    if made:
        return {ours: Theirs(name, how) for ours, (name, how) in made["names"].items()}
    known: dict[str, Any] = {"vanilla": vanilla.NAMES, "sae": sae.NAMES, "lrd": lrd.NAMES}
    return known[config.family] if config.family in known else tilelli.names_of(config)


def _said(config: Any) -> dict[str, Any]:
    """The configuration as the originals have it, and the rest of ours beside."""
    said = config_lib.to_dict(config)
    said[PARTS] = said["quantize"]  # what the originals mean by that word is whether, and with what
    said["quantize"] = config.quantizer != "none" and config.quantizer
    return {key: np.asarray(value).tolist() for key, value in said.items()}
