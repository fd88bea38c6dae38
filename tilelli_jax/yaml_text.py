"""YAML as people mean it: a key that stands twice is an error, and a date is text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def parse(text: str) -> Any:
    """What the text holds, as dicts, lists and scalars; no other objects are made.

    Raises:
        ValueError: it is not YAML: what is wrong and where, in one line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(problem + (f" (line {mark.line + 1})" if mark else "")) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dump(tree: Mapping[str, Any]) -> str:
    """The text that `parse` reads back, keys in their order."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # The standard asks for keys that differ; PyYAML takes the last one without a word.
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice",
                                               problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}


class _Dumper(yaml.SafeDumper):
    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Written plainly, the rarer line breaks would come back as spaces.
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
