"""The model card of a model directory: `README.md`, in the format of the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tilelli_jax import config as config_lib

CARD = "README.md"
# A file with this line is replaced when its network is.
MARK = "<!-- Written by tilelli_jax. Without this line, tilelli_jax does not overwrite the file. -->"
PACKAGES = ("jax", "flax", "numpy")
FAMILIES = {
    "routed": "byte-level language model whose blocks mix several pathways (`routed`)",
    "vanilla": "byte-level decoder-only transformer (`vanilla`)",
    "gpt_neox": "decoder-only transformer of the GPT-NeoX family (`gpt_neox`)",
    "llama": "decoder-only transformer of the Llama family (`llama`)",
    "gemma3": "decoder-only transformer of the Gemma 3 family (`gemma3`)",
    "gemma4": "decoder-only transformer of the Gemma 4 family (`gemma4`)",
    "t5": "encoder-decoder transformer of the T5 family (`t5`)",
    "sae": "sparse autoencoder of a network's activations (`sae`)",
    "lrd": "sidecar: predicts from a network's activations whether the network knows an answer (`lrd`)"}
BYTE_LEVEL = ("routed", "vanilla")
# Settings that the table shows, where the configuration has them.
SHOWN = {"quantizer": "quantiser of the weights", "max_seq_len": "context, in tokens",
         "model_type": "model_type in transformers",
         "vocab_size": "vocabulary, in tokens", "n_layers": "blocks", "d_model": "width",
         "pathways": "pathways", "abstain_head": "abstain head", "n_latents": "latents",
         "k": "active latents per row", "source_model": "source model",
         "hook": "source hook", "layer": "source layer",
         "n_features": "features per layer", "n_prompt_features": "features of the whole prompt"}
UNSET: tuple[Any, ...] = (None, "", -1, [], False)
LIMITS = {
    "sae": "Its latents have no verified meaning. It has not been evaluated on other networks, layers or "
           "data.",
    "lrd": "It is fitted to one network and to questions like those of its data, and may be wrong for "
           "others."}
TEXT_LIMITS = ("It continues text and may state falsehoods. It has not been evaluated for factual accuracy, "
               "bias or harmful output, nor on any data but those named here.")


@dataclasses.dataclass(frozen=True)
class CardInfo:
    """What a model card says besides the network itself; what is empty is left out.

    Attributes:
        name: title of the card; empty: the family.
        data: the training data, as sentences or `name: value`.
        datasets: names of the data sets on the Hugging Face hub.
        losses: values by name.
        unit: unit of the losses.
        command: the command that made the model.
        made_from: the models or checkpoints that it was made from, as a sentence.
        turns: for a byte-level network that chats, a turn of either side with {message} and {answer}, up to
            the start of the next turn; empty: it continues text.
    """

    name: str = ""
    data: Sequence[str] = ()
    datasets: Sequence[str] = ()
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unit: str = ""
    command: str = ""
    made_from: str = ""
    turns: str = ""


def model_card(config: Any, n_parameters: int, info: CardInfo | None = None) -> str:
    """Returns the card of a network as Markdown with a YAML head.

    The head states no licence, which is the user's to choose.

    Args:
        config: the network's configuration.
        n_parameters: number of parameters.
    """
    info = info or CardInfo()
    generates = config.family not in LIMITS and config.family != "t5"
    head: dict[str, Any] = {"library_name": "tilelli_jax", "tags": _tags(config)}
    if generates:
        head["pipeline_tag"] = "text-generation"
    if info.datasets:
        head["datasets"] = list(info.datasets)
    settings = config_lib.to_dict(config)
    shown = [(label, settings[key]) for key, label in SHOWN.items() if settings.get(key) not in UNSET]
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n{MARK}",
             f"# {_one_line(info.name) or config.family}\n\nA {FAMILIES[config.family]}.",
             _table("network", "value", {"parameters": f"{n_parameters:,}", **dict(shown)})]
    if info.made_from:
        parts.append(f"## Origin\n\n{_one_line(info.made_from)}")
    if info.data:
        parts.append("## Training data\n\n" + "\n".join(f"- {_one_line(line)}" for line in info.data))
    if info.losses:
        parts.append("## Results\n\n" + _table("loss", info.unit, {
            name: f"{value:.4f}" for name, value in info.losses.items()}))
    if info.command:
        parts.append(f"## Command\n\n{_code(info.command)}\n\nVersions: {_versions()}.")
    parts.append("## Use\n\n" + _code(_use(config.family, info.turns), "python"))
    if info.turns:
        parts += [_code("tilelli chat --model .  # in this directory"),
                  "It was trained on turns of this form; the start of the user's next turn ends the answer:",
                  _code(info.turns)]
    elif generates:
        parts.append(_code("tilelli generate --model . --prompt 'The '  # in this directory"))
    return "\n\n".join([*parts, f"## Limits\n\n{_limits(config.family)}"]) + "\n"


def is_ours(card: str) -> bool:
    """Whether a card was written by this module, and not edited by its user."""
    return MARK in card


def _tags(config: Any) -> list[str]:
    quantizer = getattr(config, "quantizer", "none")
    return ["jax", config.family, *(["byte-level"] if config.family in BYTE_LEVEL else []),
            *([quantizer] if quantizer != "none" else [])]


def _use(family: str, turns: str) -> str:
    """Returns Python code that loads the network and runs it once."""
    lines = ["import tilelli_jax", "", 'model = tilelli_jax.load(".")  # this directory']
    match family:
        case "sae":
            lines += ["codes = model.encode(activations)  # [rows, d_model] → the active latents of each row",
                      "reconstruction = model.decode(codes)"]
        case "lrd":
            lines.append("p_knows = model(features, prompt_features)  # [questions], 0 … 1")
        case "routed" | "vanilla" if turns:
            prompt, _, stop = turns.replace("{message}", "Who are you?").partition(" {answer}")
            lines += [f"prompt = {prompt!r}",
                      f"print(tilelli_jax.generate(model, prompt, max_new=100, stop={stop!r})[0].text)"]
        case "routed" | "vanilla":
            lines.append('print(tilelli_jax.generate(model, "The ", max_new=100)[0].text)')
        case "t5":
            lines.append("# See tilelli_jax.models.t5.")
        case _:
            lines.append("logits = model(ids)  # [batch, time] → [batch, time, vocabulary]")
    return "\n".join(lines)


def _limits(family: str) -> str:
    byte_level = "It reads and writes UTF-8 bytes, without a tokenizer. " if family in BYTE_LEVEL else ""
    return byte_level + LIMITS.get(family, TEXT_LIMITS)


def _versions() -> str:
    names = ("tilelli_jax", *PACKAGES)
    return ", ".join([f"Python {platform.python_version()}",
                      *(f"{name} {importlib.metadata.version(name)}" for name in names if _has(name))])


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _table(first: str, second: str, rows: Mapping[str, Any]) -> str:
    return "\n".join([f"| {first} | {second} |", "|---|---|", *(
        f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else (
        {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value))
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _code(text: str, language: str = "") -> str:
    """Returns a code block, with a fence longer than any in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"
