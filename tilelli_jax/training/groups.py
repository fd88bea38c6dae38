"""Groups of parameters by name, and operations that select or replace them in a tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from tilelli_jax.errors import InputError
from tilelli_jax.parallel.sharding import path_name

Group = Literal["everything", "embed", "positions", "unembed", "norms", "router", "conv", "state",
                "attention", "dense", "paths", "abstain"]
Trained = Callable[[str], bool]  # dotted name → whether updates change that parameter

# Patterns of dotted names as in memory, with stacked layers: `blocks.router.kernel`. Every parameter is in
# exactly one group other than `everything` and `paths`.
GROUPS: dict[str, str] = {
    "everything": r".*",
    "embed": r"embed\..*",  # and the unembedding, if tied
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
    """Returns True: every parameter is trained."""
    del name
    return True


def trained_of(groups: Sequence[str]) -> Trained:
    """Returns the predicate that is true for parameters in one of the groups."""
    if "everything" in groups:
        return everything
    pattern = re.compile("|".join(GROUPS[group] for group in groups))
    return lambda name: pattern.fullmatch(name) is not None


def check_groups(groups: Sequence[str], params: Any, key: str) -> None:
    """Raises InputError, naming `key`, if a group has no parameter in the tree."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    present = [group for group, pattern in GROUPS.items()
               if any(re.fullmatch(pattern, name) for name in names)]
    if missing := [group for group in groups if group not in present]:
        raise InputError(f"{key}: this network has no parameters of '{missing[0]}'; expected some of "
                         f"{', '.join(present)}")


def select(params: dict[Any, Any], trained: Trained, prefix: str = "") -> dict[Any, Any]:
    """Returns the trained leaves of a tree of nested dicts, without empty branches."""
    if trained is everything:
        return params
    selected: dict[Any, Any] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            if inside := select(value, trained, f"{prefix}{key}."):
                selected[key] = inside
        elif trained(f"{prefix}{key}"):
            selected[key] = value
    return selected


def merge(params: dict[Any, Any], part: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the tree with the leaves of `part` replacing its own."""
    return {key: value if key not in part else
            merge(value, part[key]) if isinstance(value, dict) else part[key]
            for key, value in params.items()}
