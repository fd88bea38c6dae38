"""Hugging Face families; their maps of names are those of the networks' `from_pretrained`."""

from __future__ import annotations

from collections.abc import Sequence

from tilelli_jax.errors import InputError
from tilelli_jax.models.gemma3 import FlaxGemma3ForCausalLM
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM
from tilelli_jax.models.llama import FlaxLlamaForCausalLM
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.models.t5 import FlaxT5ForConditionalGeneration
from tilelli_jax.pretrained import hugging_face

from ..plan import Plan, SourceFamily, configured, make_plan
from ..source import Source


def _family(network: type[PretrainedModel]) -> SourceFamily:
    theirs = network.hugging_face

    def recognises(source: Source) -> bool:
        return _is_checkpoint(source) and source.config.get("model_type") in theirs.model_types

    def plan(source: Source, overrides: Sequence[str]) -> Plan:
        if not _is_checkpoint(source):
            raise InputError(f"{source.path}: expected a directory, found a PyTorch file; "
                             f"--from {theirs.family} reads a Hugging Face directory or a GGUF file")
        config_path = str(source.path if source.is_gguf else source.path / hugging_face.CONFIG)
        source = source.with_names(theirs.current_name)
        inferred = hugging_face.settings(theirs, source.config, source.tensors, config_path)
        config = configured(network.config_class, inferred, overrides, config_path)
        return make_plan(theirs.family, network, config, theirs.names(config), source, theirs.ignored(config))

    return SourceFamily(theirs.family, recognises, plan)


def _is_checkpoint(source: Source) -> bool:
    return source.is_directory or source.is_gguf


GPT_NEOX, LLAMA, GEMMA3, GEMMA4, T5 = (_family(network) for network in (
    FlaxGPTNeoXForCausalLM, FlaxLlamaForCausalLM, FlaxGemma3ForCausalLM, FlaxGemma4ForCausalLM,
    FlaxT5ForConditionalGeneration))
