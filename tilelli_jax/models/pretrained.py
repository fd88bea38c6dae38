"""`from_pretrained` and `save_pretrained`: networks in Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.models.arrays import ParamType, check_sizes, from_tensors, outline, to_arrays
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.pretrained import hugging_face
from tilelli_jax.pretrained.hugging_face import Family
from tilelli_jax.sharding import Mesh
from tilelli_jax.tensors import in_memory, read_directory


class Pretrained(nnx.Module):
    """A network that transformers knows too; the methods have the names they had in its Flax classes."""

    hugging_face: ClassVar[Family]
    config_class: ClassVar[type]
    config: Any

    @classmethod
    def from_pretrained(cls, path: str | Path, compute: ComputeConfig | None = None, *,
                        param_dtype: ParamType = "float32", mesh: Mesh | None = None) -> Self:
        """Reads a Hugging Face directory: config.json and safetensors, in one file or several.

        Args:
            param_dtype: what the weights are kept in; "stored" for the type that the files have.
            mesh: devices to lay the weights over, each as it is read (see `sharding.RULES`).

        Raises:
            InputError: it is none of this family, or its tensors are not those of its configuration.
        """
        path = Path(path)
        family, source = cls.hugging_face, f"{path / hugging_face.CONFIG}"
        tree = hugging_face.read_config(path)
        found = hugging_face.present(family, read_directory(path), str(path))
        tree = hugging_face.settings(family, tree, found, source)
        config: Any = config_lib.from_dict(cls.config_class, tree, source)
        check_sizes(config, {name: tensor.shape for name, tensor in found.items()}, source)
        wanted = outline(cls, config, compute)
        arrays = hugging_face.read(family, config, {name: leaf.shape for name, leaf in wanted.items()},
                                   found, str(path))
        return from_tensors(cls, config, arrays, compute, source=str(path), param_dtype=param_dtype,
                            mesh=mesh)

    def save_pretrained(self, path: str | Path,
                        dtype: Literal["float32", "bfloat16"] | None = None) -> None:
        """Writes the directory that `from_pretrained` and transformers read.

        Args:
            dtype: what the weights are written in; by default the type they have.

        Raises:
            InputError: the directory cannot be written.
        """
        arrays = {name: in_memory(array) for name, array in to_arrays(self).items()}
        kind: np.dtype | None = None if dtype is None else np.dtype(jnp.dtype(dtype))
        try:
            hugging_face.write(self.hugging_face, self.config, arrays, Path(path), kind)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
