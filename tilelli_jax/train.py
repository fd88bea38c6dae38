"""Trains a network: python -m tilelli_jax.train --config FILE [key=value …] [run_dir=PATH].

The same command again goes on where the run stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.data.corpus import Splits, open_corpus
from tilelli_jax.data.windows import training_batches, validation_batches
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.models import weights
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.models.trigram import fit_trigram
from tilelli_jax.sharding import batch_devices, local_rows, make_mesh, place_rows, replicated
from tilelli_jax.training import distributed, report
from tilelli_jax.training.checkpoint import Checkpoints
from tilelli_jax.training.diagnose import Diverged, diagnose
from tilelli_jax.training.evaluate import make_evaluate
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.flops import peak_flops, train_flops_per_token
from tilelli_jax.training.log import MetricsLog, Progress, read_metrics, require_extras
from tilelli_jax.training.loop import Sitting, Trainer
from tilelli_jax.training.losses import next_byte_loss
from tilelli_jax.training.run import RunDirectory, provenance
from tilelli_jax.training.step import (
    Metrics,
    Network,
    TrainState,
    check_memory,
    make_training,
    parameter_count,
    take_apart,
)

log = logging.getLogger(__name__)
DIVERGED = 3  # exit status: training anew from the last checkpoint would come to the same


@command
def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = _options(argv)
    if options.distributed:
        distributed.initialize()
    config = config_lib.load(ExperimentConfig, options.config, options.overrides)
    path = Path(config.run_dir or Path("runs", Path(options.config).stem))
    config = dataclasses.replace(config, run_dir=str(path))
    run = RunDirectory(path)
    try:
        if jax.process_index() == 0:
            run.lock()
        with distributed.catch_sigterm():
            return train(config, run, resume=options.resume)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"out of memory: {str(error).partition(chr(10))[0]}; less is needed with a smaller "
                         f"train.batch_size or a larger train.accumulate, compute.remat=true, or "
                         f"mesh.fsdp over more devices") from None
    finally:
        run.close()


def train(config: ExperimentConfig, run: RunDirectory, *, resume: bool = False) -> int:
    """One sitting of a run, from wherever it stands to its end or to a request to stop.

    Returns the exit status: 0 when the run is complete, or was asked to stop and has saved.
    """
    name = run.path.resolve().name
    first = jax.process_index() == 0
    tell = print if first else (lambda *_, **__: None)

    # What is asked for, checked before anything is written.
    require_extras(config.log)
    mesh = make_mesh(config.mesh)
    config.train.check_shared(batch_devices(mesh))
    splits = open_corpus(config.data)
    batches = _training_batches(config, splits, mesh)
    held_out = validation_batches(splits.valid, batch_size=config.train.eval_batch_size,
                                  seq_len=config.train.seq_len, max_bytes=config.train.eval_bytes or None,
                                  rows=local_rows(mesh, config.train.eval_batch_size))
    start_from = (store.load(config.train.init_from, config.compute)
                  if config.train.init_from and not run.has_checkpoints() else None)
    if start_from is not None and start_from.config != config.model:
        key, (theirs, ours) = next(iter(config_lib.differences(start_from.config, config.model).items()))
        raise InputError(f"train.init_from: {config.train.init_from} has {key} {theirs}, "
                         f"and model.{key} is {ours}")
    loss = next_byte_loss(config.train.load_balance)
    training = make_training(config.model, config.compute, config.optimizer, steps=config.train.steps,
                             loss=loss, seed=config.seed, mesh=mesh, model=start_from)
    check_memory(training.outline)
    if run.open(config, force_resume=resume, write=first):
        if first:
            print(f"{run.path} is complete (another run_dir=… trains anew):")
            _tell_end(config, run, run.read_summary(), store.load(run.model))
        return 0
    if first:
        run.lock()  # a new directory exists only now

    with contextlib.ExitStack() as until_the_end:
        until_the_end.enter_context(jax.set_mesh(mesh))
        # The state: weights from a checkpoint of this run, from another model, or at random.
        network, outline, make, update = training
        checkpoints = until_the_end.enter_context(
            contextlib.closing(Checkpoints(run.checkpoints, config.train.keep)))
        sitting, iterator, corpus = Sitting(), iter(batches), splits.fingerprint()
        if found := checkpoints.latest(outline):
            state, notes = found
            if notes.pop("corpus") != corpus and not resume:
                raise InputError(f"data.source: {splits.name} is not the text that {run.path} has learned "
                                 f"from; choose another run_dir, or --resume to go on with this text")
            iterator.set_state(notes.pop("data"))
            sitting = Sitting(**notes)
        else:
            state = make()
        del training, make, start_from  # they hold a second copy of the weights
        tell(f"{name}: {config.model.family}, {parameter_count(state.params):,} parameters; {splits.name}: "
             f"{len(splits.train):,} bytes to learn from, {len(splits.valid):,} to validate on; "
             f"{jax.device_count()} × {jax.devices()[0].device_kind}"
             + (f"; going on from step {sitting.step}" if sitting.step else ""), flush=True)

        # What the loop turns.
        trainer = Trainer(
            config=config.train,
            update=update,
            place=_placer(config, mesh),
            evaluate=make_evaluate(network, held_out, mesh, batch_size=config.train.eval_batch_size),
            diagnose=_diagnoser(config, network, loss, mesh),
            extra=_zero_fraction(network, mesh),
            flops_per_token=train_flops_per_token(config.model, config.train.seq_len),
            peak_flops=peak_flops(jax.devices()[0]),
            checkpoints=checkpoints,
            notes={"corpus": corpus},
            log=MetricsLog(run.metrics, config.log, from_step=sitting.step, name=name,
                           settings=config_lib.to_dict(config)) if first else None,
            progress=Progress(config.train.steps, sitting.step, show=first))
        until_the_end.callback(trainer.progress.close)
        if trainer.log:
            until_the_end.callback(trainer.log.close)
        state, sitting = trainer.run(state, iterator, sitting)
        if sitting.step < config.train.steps:
            tell(f"stopped and saved at step {sitting.step} of {config.train.steps}; "
                 f"the same command goes on from there", flush=True)
            return distributed.stop_status()
        params, exported = _exported(config, checkpoints, state, outline, sitting)
        params = _gathered(params, mesh)
        if first:
            until_the_end.close()  # lets go of the checkpoints
            model = network.merge(params)
            _tell_end(config, run, _finish(config, run, model, exported, sitting, splits, mesh), model)
    return 0


def _finish(config: ExperimentConfig, run: RunDirectory, model: Decoder, exported: int,
            sitting: Sitting, splits: Splits, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Writes model/, loss.png and, last, summary.json: it is what says that a run is complete."""
    store.save(model, run.model)
    n_parameters = parameter_count(take_apart(model)[1])
    tokens = sitting.step * config.train.batch_size * config.train.seq_len
    summary = {
        "final_valid_loss": sitting.valid_loss, "best_valid_loss": sitting.best_loss,
        "final_valid_bits_per_byte": sitting.valid_loss / math.log(2),
        "best_valid_bits_per_byte": sitting.best_loss / math.log(2),
        "best_step": sitting.best_step, "steps": sitting.step, "exported_step": exported,
        "parameters": n_parameters, "tokens": tokens, "seconds": round(sitting.seconds, 1),
        "trigram_valid_loss": (
            fit_trigram(splits.train).nats_per_byte(splits.valid, config.train.eval_bytes or None)
            if config.report.trigram else None),
        "mesh": dict(mesh.shape), **provenance(config.seed)}
    baselines = {}
    if config.report.reference is not None:
        baselines[config.report.reference_name or "reference"] = config.report.reference
    if summary["trigram_valid_loss"] is not None:
        baselines["byte trigrams"] = summary["trigram_valid_loss"]
    report.plot_losses(read_metrics(run.metrics), run.figure,
                       f"{run.path.resolve().name}: {n_parameters:,} parameters on {splits.name}", baselines)
    run.write_summary(summary)
    return summary


def _tell_end(config: ExperimentConfig, run: RunDirectory, summary: dict[str, Any], model: Decoder) -> None:
    """What a run has come to."""
    print(f"\n{report.losses_table(summary, config.report)}\n")
    print(f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s; model: {run.model}; "
          f"figure: {run.figure}")
    if config.report.prompts:
        print(f"\n{report.continuations(model, config.report, config.seed)}")


# ---------------------------------------------------------------------------------------------


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m tilelli_jax.train", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"keys, with their defaults:\n{config_lib.describe(ExperimentConfig)}")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in run_dir even though settings have changed")
    parser.add_argument("--distributed", action="store_true",
                        help="one of several processes (see launch/README.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="settings that take precedence over the file's, e.g. train.steps=50")
    return parser.parse_intermixed_args(argv)


def _training_batches(config: ExperimentConfig, splits: Splits, mesh: jax.sharding.Mesh) -> Any:
    """The batches' rows that this process's devices hold: parts one after the other."""
    part = config.train.batch_size // config.train.accumulate
    rows = np.concatenate([i * part + local_rows(mesh, part) for i in range(config.train.accumulate)])
    return training_batches(splits.train, batch_size=config.train.batch_size,
                            seq_len=config.train.seq_len, seed=config.data.shuffle_seed, rows=rows,
                            prefetch=config.data.prefetch)


def _placer(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> Any:
    """Host batch → `{"bytes": [parts, batch / parts, time + 1]}` on the devices."""
    parts = config.train.accumulate

    def place(batch: Any) -> dict[str, jax.Array]:
        split = batch.bytes.reshape(parts, -1, batch.bytes.shape[-1])
        return {"bytes": place_rows(split, mesh, config.train.batch_size // parts, axis=1)}
    return place


def _diagnoser(config: ExperimentConfig, network: Network, loss: Any, mesh: jax.sharding.Mesh) -> Any:
    place = _placer(config, mesh)

    def look(state: TrainState, batch: Any) -> list[str]:
        whole = {name: array.reshape(-1, *array.shape[2:]) for name, array in place(batch).items()}
        return diagnose(network, state.params, whole, jax.random.wrap_key_data(state.key), loss, mesh)
    return look


def _zero_fraction(network: Network, mesh: jax.sharding.Mesh) -> Any:
    """What share of the quantised weights is zero, if any are quantised."""
    def measure(params: Any) -> Metrics:
        codes = [weight.codes() for weight in weights(network.merge(params)).values()
                 if weight.quantizer.levels]
        if not codes:
            return {}
        zeros = jnp.stack([jnp.sum(code == 0) for code in codes]).sum()
        return {"zero_fraction": zeros / sum(code.size for code in codes)}
    return jax.jit(measure, out_shardings=replicated(mesh))


def _exported(config: ExperimentConfig, checkpoints: Checkpoints, state: TrainState,
              outline: TrainState, sitting: Sitting) -> tuple[Any, int]:
    """The parameters that go into model/, and the step that they are of."""
    if config.train.export == "best" and sitting.best_step != sitting.step:
        jax.tree.map(lambda a: a.delete(), state.opt_state)  # makes room
        try:
            return checkpoints.restore(sitting.best_step, outline).state.params, sitting.best_step
        except InputError as error:
            log.warning("%s; model/ gets the last weights, not the best ones", error)
    return state.params, sitting.step


def _gathered(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """The parameters from all devices and processes, on this one's first device."""
    whole = jax.jit(lambda params: params, out_shardings=replicated(mesh))(params)
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a.addressable_data(0))), whole)


if __name__ == "__main__":
    distributed.exit_with(main)
