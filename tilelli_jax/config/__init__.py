"""Configurations: frozen dataclasses read from YAML, with dotted overrides and errors that name keys.

A section of a configuration is a frozen dataclass derived from `Section`. `setting` defines its fields, each
with a default, a meaning and bounds. Each section is defined next to the code that it configures
(`RoutedConfig` in `models/routed.py`, `MeshConfig` in `parallel/sharding.py`, …); `training/config.py`
combines them into the configuration of a training run.

A field may be a choice of sections, `RoutedConfig | VanillaConfig`; the `Literal` that each has under
`family` distinguishes them. An optional section, `ChronosConfig | None`, is None if the file sets it to null
or omits it. A mapping, `dict[str, NetworkConfig]`, has sections under names that the file chooses.
"""

from tilelli_jax.config.files import find, load, overridden, read_yaml, shipped
from tilelli_jax.config.help import command_line, describe
from tilelli_jax.config.schema import MAX_INTEGER, Section, setting
from tilelli_jax.config.tree import differences, dump, from_dict, settings, to_dict

__all__ = ["MAX_INTEGER", "Section", "command_line", "describe", "differences", "dump", "find",
           "from_dict", "load", "overridden", "read_yaml", "setting", "settings", "shipped",
           "to_dict"]
