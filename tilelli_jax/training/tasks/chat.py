"""The fine-tuning task: train a network on pairs of a prompt and its response."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.data.chat_pairs import ChatPair, open_pairs
from tilelli_jax.data.chat_rows import (
    POSITION,
    ChatBatch,
    ChatRows,
    pack_rows,
    training_rows,
    validation_rows,
)
from tilelli_jax.data.reading import check_batches
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.loading import store
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.parallel.sharding import Mesh, local_rows, place_rows, replicated
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.distributed import compile_barrier
from tilelli_jax.training.flops import train_flops_per_token
from tilelli_jax.training.groups import check_groups
from tilelli_jax.training.loss import NATS, LossUnit
from tilelli_jax.training.run import RunDirectory
from tilelli_jax.training.step import Network, Training, split_params
from tilelli_jax.training.tasks.base import LanguageTask
from tilelli_jax.training.tasks.chat_loss import ChatLoss, loss_terms

WEIGHTED = LossUnit("weighted loss")
WEIGHTS = ("response", "prompt", "last", "inside")  # arrays of a batch that weight the loss terms


class ChatTask(LanguageTask):
    """Fine-tunes on pairs. Raises InputError if pairs are unreadable or too long, or a loss does not fit."""

    key = "chat.source"
    unit = "positions"  # of rows with their padding
    logged = ("nats", "abstain", "router_entropy_loss", "router_kl", "router_entropy", "zero_fraction")

    def __init__(self, config: ExperimentConfig, mesh: Mesh) -> None:
        assert not isinstance(config.model, SAEConfig) and config.chat is not None
        super().__init__(config, mesh)
        train, section, goal = config.train, config.chat, config.finetune
        _check_network(config)
        check_batches(train.batch_size, train.eval_batch_size, POSITION * train.seq_len, jax.process_count())
        splits = open_pairs(section, train.seq_len)
        self.train_rows = pack_rows(splits.train, train.seq_len, pack=section.pack, seed=section.shuffle_seed,
                                    loss_on=section.loss_on, abstain_position=section.abstain_position)
        self.valid_rows = pack_rows(splits.valid, train.seq_len, pack=False, loss_on=section.loss_on,
                                    abstain_position=section.abstain_position)
        self.max_rows = max(1, train.eval_bytes // train.seq_len) if train.eval_bytes else None
        if goal.cross_entropy_weight:
            for counts, file, use in (
                    (self.train_rows.counts, section.source, "train on"),
                    (self.valid_rows.counts[:self.max_rows], section.valid or section.source, "validate on")):
                if not counts[:, 0].any():
                    raise InputError(f"finetune.cross_entropy_weight: expected 0, as {file} has no response "
                                     f"that counts among the pairs to {use}, found "
                                     f"{goal.cross_entropy_weight:g}")
        self.batches = training_rows(self.train_rows, batch_size=train.batch_size, seed=section.shuffle_seed,
                                     rows=self.rows, prefetch=section.prefetch)
        self.source = section.source
        self.size = (f"{_size(splits.train)} to train on in {len(self.train_rows):,} rows, "
                     f"{_size(splits.valid)} to validate on")
        self.fingerprint = splits.fingerprint()
        self.tokens = train.batch_size * train.seq_len
        if "everything" in goal.trainable and not goal.router_kl_weight:
            self.flops_per_token = train_flops_per_token(config.model, train.seq_len)
        only_nats = goal.cross_entropy_weight == 1 and not (
            goal.abstain_weight or goal.router_entropy_weight or goal.router_kl_weight)
        self.loss_unit = NATS if only_nats else WEIGHTED

    def make_loss(self, steps: int) -> ChatLoss:
        del steps
        return ChatLoss(self.config.finetune)

    def prepare(self, model: Any, steps: int) -> Training:
        training = super().prepare(model, steps)
        check_groups(self.config.finetune.trainable, training.abstract_state.params, "finetune.trainable")
        return training

    def arrays(self, batch: ChatBatch) -> dict[str, np.ndarray]:
        # The weights sum to 1 over the whole batch, and the update averages over parts: scale by their
        # number.
        return {name: array * np.float32(self.config.train.accumulate) if name in WEIGHTS else array
                for name, array in batch._asdict().items() if name != "rows"}

    def describe_batch(self, batch: ChatBatch) -> str:
        """Names the file lines of a batch's pairs, at most four."""
        lines = self.train_rows.lines(batch.rows)
        return f"of {'; '.join(lines[:4])}{'; …' if len(lines) > 4 else ''}"

    def evaluate(self, params: Any) -> float:
        """Returns the weighted sum of the terms on the validation pairs, without `router_kl`."""
        return float(self.config.finetune.weighted(self._held_out_terms(params)))

    @functools.cached_property
    def _held_out_terms(self) -> Callable[[Any], dict[str, float]]:
        return held_out_terms(self.network, self.valid_rows, mesh=self.mesh, max_rows=self.max_rows,
                              batch_size=self.config.train.eval_batch_size)

    def summarize(self, model: Any) -> dict[str, Any]:
        """Returns the trained groups, and each term on the validation pairs."""
        network, params = split_params(model)
        terms = held_out_terms(network, self.valid_rows, max_rows=self.max_rows,
                               batch_size=self.config.train.eval_batch_size)(params)
        n_pairs = min(len(self.valid_rows), self.max_rows or len(self.valid_rows))
        return {"trained": list(self.config.finetune.trainable), "held_out": {"pairs": n_pairs, **terms}}


def held_out_terms(network: Network, rows: ChatRows, *, batch_size: int, max_rows: int | None = None,
                   mesh: Mesh | None = None) -> Callable[[Any], dict[str, float]]:
    """Returns `mean_terms(params)`: means over held-out pairs, one pair per row if `rows` are not packed.

    `cross_entropy` is in nats per byte of the responses. A network with an abstain head adds `abstain`,
    `abstain_p_known` and `abstain_p_unknown`; one with a router adds `router_entropy_loss`, `entropy_known`
    and `entropy_unknown`. "known" covers prompts with an answer, "unknown" those without; a term is left out
    if its mean is over nothing.

    Args:
        max_rows: use at most this many rows; None uses all.
        mesh: devices that share each batch; None uses this process's first device.
    """
    chosen = None if mesh is None else local_rows(mesh, batch_size)
    batches = validation_rows(rows, batch_size=batch_size, rows=chosen, max_rows=max_rows)

    totals = _totals(network.graph, mesh)

    def mean_terms(params: Any) -> dict[str, float]:
        sums = []
        for batch in batches:
            arrays = {name: array for name, array in batch._asdict().items() if name != "rows"}
            sums.append(totals(network.buffers, params, arrays if mesh is None else {
                name: place_rows(array, mesh, batch_size) for name, array in arrays.items()}))
        terms = {name: math.fsum(float(batch_sums[name]) for batch_sums in jax.device_get(sums))
                 for name in sums[0]}
        counts = {name: terms.pop(name) for name in ("bytes", "pairs", "known", "unknown")}
        count_names = {"cross_entropy": "bytes"} | {name: name.rpartition("_")[2] for name in terms
                                                    if name.endswith("known")}
        return {name: value / count for name, value in terms.items()
                if (count := counts[count_names.get(name, "pairs")])}
    return mean_terms


@functools.lru_cache(maxsize=16)
def _totals(graph: Any, mesh: Mesh | None) -> Callable[..., dict[str, jax.Array]]:
    """Returns the function that sums the terms over a batch, compiled once per network structure."""
    def totals(buffers: Any, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        terms, _ = loss_terms(Network(graph, buffers).merge(params), batch)
        terms.pop("router_entropy", None)
        return terms | {"bytes": batch["response"].sum(), "pairs": batch["last"].sum()}
    if mesh is None:  # this process alone
        return jax.jit(totals)
    return compile_barrier(jax.jit(totals, out_shardings=replicated(mesh)))


def with_starting_network(config: ExperimentConfig, run: RunDirectory) -> ExperimentConfig:
    """Fills in `model` of a fine-tuning configuration that does not set it.

    The network is that of the existing run, if there is one, since `train.init_from` may have been deleted;
    otherwise that of `train.init_from`. It gets an abstain head if that head is trained.

    Raises:
        InputError: there is no such network, or it is of a family that cannot be fine-tuned.
    """
    if config.chat is None or not config.train.init_from or config.model != RoutedConfig():
        return config
    if run.config.is_file():
        model = config_lib.load(ExperimentConfig, run.config).model
    elif not Path(config.train.init_from).exists():
        raise InputError(f"train.init_from: {config.train.init_from}: no such directory; expected a trained "
                         "network, e.g. runs/demo/model after `tilelli train --config demo`")
    else:
        model = store.load_config(config.train.init_from)
    if not isinstance(model, RoutedConfig | VanillaConfig):
        raise InputError(f"train.init_from: {config.train.init_from} is of family {model.family}; expected "
                         "routed or vanilla")
    if config.finetune.adds_head:
        model = dataclasses.replace(model, abstain_head=True)
    return dataclasses.replace(config, model=model)


def _check_network(config: ExperimentConfig) -> None:
    model, goal = config.model, config.finetune
    assert not isinstance(model, SAEConfig)
    if not config.train.init_from and goal.trainable != ("everything",):
        raise InputError(f"finetune.trainable: expected everything where train.init_from names no model, "
                         f"found {', '.join(goal.trainable)}")
    if goal.abstain_weight and not model.abstain_head:
        raise InputError(
            "model.abstain_head: expected true, as finetune.abstain_weight trains the head, found false"
            if goal.adds_head else
            f"finetune.abstain_weight: expected 0, or the group abstain in finetune.trainable, as "
            f"{config.train.init_from} has no abstain head, found {goal.abstain_weight:g}")
    for key in ("router_entropy_weight", "router_kl_weight"):
        if getattr(goal, key) and not isinstance(model, RoutedConfig):
            raise InputError(f"finetune.{key}: expected 0 for family {model.family}, which has no router, "
                             f"found {getattr(goal, key):g}")
    if config.train.seq_len > model.max_seq_len and model.positions == "learned":
        raise InputError(f"train.seq_len: expected at most model.max_seq_len {model.max_seq_len}, "
                         f"found {config.train.seq_len}")


def _size(pairs: Sequence[ChatPair]) -> str:
    unanswerable = sum(not pair.answerable for pair in pairs)
    return f"{len(pairs):,} pairs" + (f" ({unanswerable:,} without an answer)" if unanswerable else "")
