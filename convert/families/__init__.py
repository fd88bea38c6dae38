"""The families of checkpoints, one module each, and the detection of a source's family."""

from __future__ import annotations

from tilelli_jax.errors import InputError

from ..plan import SourceFamily
from ..source import Source
from .hugging_face import GEMMA3, GEMMA4, GPT_NEOX, LLAMA, T5
from .lrd import LRD
from .sae import SAE
from .tilelli import ATOME, TILELLI
from .vanilla import VANILLA

# In order of precedence: the first family that recognises a source is used.
FAMILIES: dict[str, SourceFamily] = {
    family.name: family for family in (
        GPT_NEOX, LLAMA, GEMMA3, GEMMA4, T5, SAE, LRD, VANILLA, ATOME, TILELLI)}
OTHER_NAMES = {"chronos": "t5"}


def family_of(source: Source, name: str | None) -> SourceFamily:
    """Returns the family of this name, or the first that recognises the source if `name` is None.

    Raises:
        InputError: no family has this name, or none recognises the source.
    """
    if name is not None:
        family_name = OTHER_NAMES.get(name, name)
        if family_name not in FAMILIES:
            raise InputError(f"--from: expected one of {', '.join([*FAMILIES, *OTHER_NAMES])}, "
                             f"found '{name}'")
        return FAMILIES[family_name]
    recognised = next((family for family in FAMILIES.values() if family.recognises(source)), None)
    if recognised is None and source.is_directory and "family" in source.config:
        raise InputError(f"{source.path}: expected a checkpoint to convert, found a model directory; "
                         "tilelli_jax.load reads it, --to torch converts it back")
    if recognised is None:
        kind = source.config.get("model_type")
        if kind == "tilelli_routed":
            raise InputError(f"{source.path}: written by --to hf for transformers, which is one-way: "
                             "quantised weights are frozen; expected the model directory, or a .pt file "
                             "of --to torch")
        contents = f"model_type '{kind}'" if kind else f"tensors like {', '.join(list(source.tensors)[:3])}"
        raise InputError(f"{source.path}: expected a checkpoint of a known family ({', '.join(FAMILIES)}; "
                         f"--from selects one), found {contents}")
    return recognised
