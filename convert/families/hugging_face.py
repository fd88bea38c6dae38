"""Families whose maps the networks themselves bring, for `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM
from tilelli_jax.models.pretrained import Pretrained
from tilelli_jax.models.t5 import FlaxT5ForConditionalGeneration
from tilelli_jax.pretrained import hugging_face

from ..plan import Family, Plan, configured, make_plan
from ..source import Source


def _family(network: type[Pretrained]) -> Family:
    theirs = network.hugging_face

    def recognises(source: Source) -> bool:
        return source.is_directory and source.tree.get("model_type") in theirs.model_types

    def plan(source: Source, settings: Mapping[str, Any]) -> Plan:
        if not source.is_directory:
            raise InputError(f"{source.path}: a file of PyTorch; --from {theirs.family} reads a Hugging Face "
                             "directory")
        where = f"{source.path / hugging_face.CONFIG}"
        source = source.with_names(theirs.present_name)
        said = hugging_face.settings(theirs, source.tree, source.tensors, where)
        config = configured(network.config_class, said, settings, where)
        return make_plan(theirs.family, network, config, theirs.names, source, theirs.ignored(config))

    return Family(theirs.family, recognises, plan)


GPT_NEOX, GEMMA4, T5 = (_family(network) for network in (
    FlaxGPTNeoXForCausalLM, FlaxGemma4ForCausalLM, FlaxT5ForConditionalGeneration))
