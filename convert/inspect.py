"""The table of `--inspect`: the tensors of a source and what they would become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.cli.tables import table
from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor
from tilelli_jax.pretrained.mapping import LAYOUTS, reason_to_ignore

from .plan import Plan
from .source import Source


def report(source: Source, plan: Plan | None, problem: str) -> str:
    """One line per tensor, then the family and configuration, then the error if there is one."""
    tensors = source.tensors if plan is None else plan.tensors
    rows = [["tensor", "shape", "type", "becomes"]]
    original_names = {} if plan is None else plan.original_names
    for name, tensor in tensors.items():
        original = original_names.get(name, name)
        rows.append([original, "×".join(map(str, tensor.shape)) or "scalar",
                     source.formats.get(original, str(tensor.dtype)), _becomes(name, plan)])
    lines = [table(rows), "", f"{source.path}: {len(tensors)} tensors, {_count(tensors):,} numbers"]
    if source.is_gguf:
        counts = Counter(source.formats.values())
        lines.append(f"GGUF, architecture {source.architecture}, {source.path.stat().st_size / 1e6:,.1f} MB; "
                     f"tensors: {', '.join(f'{count} {name}' for name, count in counts.most_common())}")
    if plan is not None:
        lines.append(f"family {plan.family}; configuration:")
        lines += [f"  {key}: {value}" for key, value in config_lib.to_dict(plan.config).items()]
        lines += [f"note: {note}" for note in plan.notes]
    try:
        source.generated()
    except InputError as error:
        lines.append(f"its tokenizer cannot be converted (--tokenizer names another): {error}")
    return "\n".join([*lines, *([f"cannot be converted: {problem}"] if problem else [])])


def _becomes(name: str, plan: Plan | None) -> str:
    if plan is None:
        return "?"
    for link in plan.links:
        if name in link.theirs:
            slot = f"[{link.theirs.index(name)}]" if link.by_head else ""
            layout = "" if link.how == "same" else f"  ({LAYOUTS[link.how].meaning})"
            return f"{link.ours}{slot}{layout}"
    reason = reason_to_ignore(name, plan.ignored)
    return "not known" if reason is None else f"ignored: {reason}"


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
