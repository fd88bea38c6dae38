"""Groups of parameters by name, and trees of parameters cut down to some of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from tilelli_jax.errors import InputError
from tilelli_jax.sharding import path_name

Group = Literal["everything", "embed", "positions", "unembed", "norms", "router", "conv", "state",
                "attention", "dense", "paths", "abstain"]
Trained = Callable[[str], bool]  # of a dotted name: whether updates change that parameter

# Dotted names as they are in memory, the layers stacked: `blocks.router.kernel`. Every parameter is
# in one group besides `everything` and `paths`.
GROUPS: dict[str, str] = {
    "everything": r".*",
    "embed": r"embed\..*",  # and the unembedding, where they are tied
    "positions": r"positions\..*",
    "unembed": r"unembed\..*",
    "norms": r"(blocks\.)?(final_)?norm[12]?\..*",
    "router": r"blocks\.router\..*",
    "conv": r"blocks\.(local|wide)(_\d+)?\..*",
    "state": r"blocks\.state(_\d+)?\..*",
    "attention": r"blocks\.(attention|sparse(_\d+)?)\..*",
    "dense": r"blocks\.dense(_\d+)?\..*",
    "paths": r"blocks\.(local|wide|state|attention|sparse|dense)(_\d+)?\..*",
    "abstain": r"abstain\..*",
}


def everything(name: str) -> bool:
    """Every parameter is trained."""
    del name
    return True


def trained_of(groups: Sequence[str]) -> Trained:
    """Whether a name is in one of the groups."""
    if "everything" in groups:
        return everything
    pattern = re.compile("|".join(GROUPS[group] for group in groups))
    return lambda name: pattern.fullmatch(name) is not None


def check_groups(groups: Sequence[str], params: Any, key: str) -> None:
    """Raises InputError, which names `key`, where a group has no parameter in the tree."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    there = [group for group, pattern in GROUPS.items() if any(re.fullmatch(pattern, name) for name in names)]
    if lacking := [group for group in groups if group not in there]:
        raise InputError(f"{key}: this network has no parameters of '{lacking[0]}'; expected some of "
                         f"{', '.join(there)}")


def select(params: dict[Any, Any], trained: Trained, prefix: str = "") -> dict[Any, Any]:
    """Of a tree of nested dicts, the branches that are trained."""
    if trained is everything:
        return params
    found: dict[Any, Any] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            if inside := select(value, trained, f"{prefix}{key}."):
                found[key] = inside
        elif trained(f"{prefix}{key}"):
            found[key] = value
    return found


def merge(params: dict[Any, Any], part: dict[Any, Any]) -> dict[Any, Any]:
    """The tree with the branches that `part` has in place of its own."""
    return {key: value if key not in part else
            merge(value, part[key]) if isinstance(value, dict) else part[key] for key, value in params.items()}
