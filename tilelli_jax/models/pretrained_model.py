"""`from_pretrained` and `save_pretrained`: read and write networks as Hugging Face directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor, in_memory, read_directory
from tilelli_jax.models.arrays import ParamType, abstract_arrays, check_sizes, from_tensors, to_arrays
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import Mesh
from tilelli_jax.pretrained import hugging_face
from tilelli_jax.pretrained.gguf import read_gguf
from tilelli_jax.pretrained.gguf_file import is_gguf
from tilelli_jax.pretrained.hugging_face import Family


class PretrainedModel(nnx.Module):
    """A network that transformers supports too; the method names are those of its Flax classes."""

    hugging_face: ClassVar[Family]
    config_class: ClassVar[type]
    config: Any

    @classmethod
    def from_pretrained(cls, path: str | Path, compute: ComputeConfig | None = None, *,
                        param_dtype: ParamType = "float32", mesh: Mesh | None = None) -> Self:
        """Reads a Hugging Face directory (config.json and safetensors, one file or several) or a GGUF file.

        Args:
            param_dtype: type of the weights in memory; "stored" keeps the type in the files.
            mesh: devices over which each weight is sharded as it is read (see `sharding.RULES`).

        Raises:
            InputError: the network is not of this family, or its tensors do not fit its configuration.
        """
        path = Path(path)
        if is_gguf(path):
            return cls.from_checkpoint(*read_gguf(path)[:2], str(path), compute, param_dtype, mesh)
        return cls.from_checkpoint(hugging_face.read_config(path), read_directory(path), str(path), compute,
                                   param_dtype, mesh, config_source=f"{path / hugging_face.CONFIG}")

    @classmethod
    def from_checkpoint(cls, tree: dict[str, Any], tensors: Mapping[str, Tensor], source: str,
                        compute: ComputeConfig | None = None, param_dtype: ParamType = "float32",
                        mesh: Mesh | None = None, *, config_source: str = "") -> Self:
        """Builds the network from the content of a Hugging Face checkpoint; see `from_pretrained`.

        Args:
            tree: the content of config.json.
            tensors: the tensors by their names in the checkpoint.
            source: what error messages name; `config_source`: for errors in config.json.
        """
        family, config_source = cls.hugging_face, config_source or source
        tensors = hugging_face.current_names(family, tensors, source)
        tree = hugging_face.settings(family, tree, tensors, config_source)
        config: Any = config_lib.from_dict(cls.config_class, tree, config_source)
        check_sizes(config, {name: tensor.shape for name, tensor in tensors.items()}, config_source)
        shapes = {name: leaf.shape for name, leaf in abstract_arrays(cls, config, compute).items()}
        arrays = hugging_face.read(family, config, shapes, tensors, source)
        return from_tensors(cls, config, arrays, compute, source=source, param_dtype=param_dtype, mesh=mesh)

    def save_pretrained(self, path: str | Path,
                        dtype: Literal["float32", "bfloat16"] | None = None) -> None:
        """Writes a directory that `from_pretrained` and transformers can read.

        Args:
            dtype: type of the weights in the file; by default their current type.

        Raises:
            InputError: the directory cannot be written.
        """
        arrays = {name: in_memory(array) for name, array in to_arrays(self).items()}
        file_dtype: np.dtype | None = None if dtype is None else np.dtype(jnp.dtype(dtype))
        try:
            hugging_face.write(self.hugging_face, self.config, arrays, Path(path), file_dtype)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
