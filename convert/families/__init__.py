"""One file for each family of checkpoints, and how a source's family is told."""

from __future__ import annotations

from tilelli_jax.errors import InputError

from ..plan import Family
from ..source import Source
from .hugging_face import GEMMA4, GPT_NEOX, T5
from .lrd import LRD
from .sae import SAE
from .tilelli import ATOME, TILELLI
from .vanilla import VANILLA

# In the order in which they are asked: the first that recognises a source has it.
FAMILIES: dict[str, Family] = {
    family.name: family for family in (GPT_NEOX, GEMMA4, T5, SAE, LRD, VANILLA, ATOME, TILELLI)}
OTHER_NAMES = {"chronos": "t5"}


def family_of(source: Source, named: str | None) -> Family:
    """The family that was named, or that recognises the source.

    Raises:
        InputError: there is no such family, or none recognises it.
    """
    if named is not None:
        name = OTHER_NAMES.get(named, named)
        if name not in FAMILIES:
            raise InputError(f"--from: expected one of {', '.join([*FAMILIES, *OTHER_NAMES])}, "
                             f"found '{named}'")
        return FAMILIES[name]
    found = next((family for family in FAMILIES.values() if family.recognises(source)), None)
    if found is None and source.is_directory and "family" in source.tree:
        raise InputError(f"{source.path}: a model directory already, which tilelli_jax.load reads; "
                         "--to torch converts it back")
    if found is None:
        kind = source.tree.get("model_type")
        what = f"model_type '{kind}'" if kind else f"tensors like {', '.join(list(source.tensors)[:3])}"
        raise InputError(f"{source.path}: of no family known here ({what}); expected one of "
                         f"{', '.join(FAMILIES)}, which --from may name")
    return found
