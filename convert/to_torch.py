"""Model directories back to what PyTorch reads: Hugging Face directories and `.pt` files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import checkpoint
from convert.families import lrd, sae, tilelli, vanilla
from convert.output import new_directory
from convert.plan import Plan
from convert.source import COMPANIONS, Source
from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.files import write_atomically
from tilelli_jax.models import FAMILIES
from tilelli_jax.models.pretrained import Pretrained
from tilelli_jax.pretrained import hugging_face, mapping
from tilelli_jax.pretrained.mapping import Names, Theirs
from tilelli_jax.tensors import Tensor, read_json

RECORD = "conversion.json"  # how a model directory was made, for the way back


def record(source: Source, plan: Plan) -> dict[str, Any]:
    """What the way back needs to know of a source."""
    return {"source": source.path.name, "family": plan.family, "state_key": source.state_key,
            "config_key": source.config_key, "config": source.tree, "rest": source.rest,
            "names": {ours: [place.name, place.how] for ours, place in plan.names.items()}}


def write(config: Any, arrays: Mapping[str, Tensor], source: Path, out: Path) -> None:
    """Writes the checkpoint of a model directory.

    Args:
        arrays: of the model directory.
        source: the model directory, for files that are carried along.

    Raises:
        InputError: `out` is there already, or of the wrong kind, or cannot be written.
    """
    network = FAMILIES.get(config.family, (None, None))[1]
    if isinstance(network, type) and issubclass(network, Pretrained):
        others = {name: (source / name).read_bytes() for name in COMPANIONS if (source / name).is_file()}
        with new_directory(out) as path:
            hugging_face.write(network.hugging_face, config, arrays, path, others=others)
        return
    if out.suffix not in (".pt", ".pth") or out.exists():
        raise InputError(f"{out}: is there already; choose another OUT" if out.exists() else
                         f"{out}: expected a file name that ends in .pt")
    made = read_json(source / RECORD) if (source / RECORD).is_file() else {}
    content = checkpoint.write(out, _tree(config, arrays, made))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


def _tree(config: Any, arrays: Mapping[str, Tensor], made: Mapping[str, Any]) -> dict[str, Any]:
    names = _names(config, made)
    try:
        links = mapping.link(names, {name: array.shape for name, array in arrays.items()})
    except KeyError:  # the directory holds another network than the one that was converted
        links = mapping.link(_names(config, {}), {name: array.shape for name, array in arrays.items()})
    state = mapping.to_theirs(links, arrays)
    if config.family == "lrd":
        return lrd.tree_of(config, state)
    if config.family == "sae" or made.get("state_key") == "":
        return dict(state)
    said = made.get("config") or _said(config)
    return {made.get("state_key", "state_dict"): state, made.get("config_key") or "config": said,
            **made.get("rest", {})}


def _names(config: Any, made: Mapping[str, Any]) -> Names:
    if made.get("names"):
        return {ours: Theirs(name, how) for ours, (name, how) in made["names"].items()}
    known: dict[str, Any] = {"vanilla": vanilla.NAMES, "sae": sae.NAMES, "lrd": lrd.NAMES}
    return known[config.family] if config.family in known else tilelli.names_of(config)


def _said(config: Any) -> dict[str, Any]:
    """The configuration as the originals have it, and the rest of ours beside."""
    said = config_lib.to_dict(config)
    said["quantize"] = config.quantizer != "none" and config.quantizer
    return {key: np.asarray(value).tolist() for key, value in said.items()}
