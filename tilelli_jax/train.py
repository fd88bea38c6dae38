"""Trains a network: tilelli train --config FILE [key=value …] [run_dir=PATH].

Running the same command again resumes the run where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.cli import accelerators, allocator, program_cache
from tilelli_jax.cli.command import command
from tilelli_jax.cli.progress import waiting
from tilelli_jax.errors import InputError
from tilelli_jax.loading import store
from tilelli_jax.models import is_packed
from tilelli_jax.models.abstain import attach_head, new_head
from tilelli_jax.parallel.sharding import batch_devices, make_mesh, replicated
from tilelli_jax.training import distributed, report
from tilelli_jax.training.budget import decide_steps, few_updates
from tilelli_jax.training.checkpoint import Checkpoints
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.diagnose import Diverged
from tilelli_jax.training.groups import select
from tilelli_jax.training.log import MetricsLog, Progress, read_metrics, require_extras
from tilelli_jax.training.loop import RunState, Trainer
from tilelli_jax.training.run import RunDirectory, provenance
from tilelli_jax.training.step import Training, TrainState, check_memory, parameter_count, split_params
from tilelli_jax.training.tasks.base import Task
from tilelli_jax.training.tasks.chat import ChatTask, with_starting_network
from tilelli_jax.training.tasks.sae import AutoencoderTask, with_provenance
from tilelli_jax.training.tasks.text import TextTask

log = logging.getLogger(__name__)
# The keys that `--help` lists first.
MAIN_KEYS = ("data.source", "train.minutes", "train.steps", "run_dir", "model.family", "model.d_model",
             "model.n_layers", "model.quantizer", "optimizer.learning_rate", "train.batch_size")
DIVERGED = 3  # exit status: resuming from the last checkpoint would diverge again


@distributed.exit_on_failure
@command
def main(argv: Sequence[str]) -> int:
    for name in ("absl", "asyncio"):  # errors of Orbax's threads, which are also raised here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Of Orbax's tasks that end with such an error.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    options = _options(argv)
    program_cache.enable()
    allocator.keep_freed_memory()
    if options.distributed:
        distributed.initialize()
    config = config_lib.load(ExperimentConfig, options.config, options.overrides)
    path = Path(config.run_dir or Path("runs", Path(options.config).stem))
    config = _without_reference(dataclasses.replace(config, run_dir=str(path)), options.overrides)
    run = RunDirectory(path)
    try:
        if jax.process_index() == 0:
            run.lock()
        return train(config, run, _command(argv, config), resume=options.resume)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"out of memory: {str(error).partition(chr(10))[0]}; to need less, use a "
                         f"smaller train.batch_size, a larger train.accumulate, compute.remat=true, or "
                         f"mesh.fsdp over more devices") from None
    finally:
        run.close()


def train(config: ExperimentConfig, run: RunDirectory, command: str, *, resume: bool = False) -> int:
    """Starts or resumes a run, and trains until it is complete or is asked to stop.

    Args:
        command: the command of the run, for the model card.
        resume: resume also if settings have changed.

    Returns the exit status: 0 if the run is complete, or stopped on request after saving.
    """
    begin, name = time.monotonic(), run.name
    first = jax.process_index() == 0
    notify = print if first else (lambda *_, **__: None)

    # Check everything before anything is written.
    require_extras(config.log)
    config = with_provenance(with_starting_network(config, run))
    mesh = make_mesh(config.mesh)
    config.train.check_shared(batch_devices(mesh))
    task = _task_class(config)(config, mesh)
    start_from = _start(config) if config.train.init_from and not run.has_checkpoints() else None
    training = task.prepare(start_from, config.train.steps)
    check_memory(training.abstract_state)
    if run.open(config, force_resume=resume, write=first):
        if run.read_summary().get("corpus", task.fingerprint) != task.fingerprint:
            raise InputError(f"{task.key}: {task.source} is not the data that {run.path} was trained on; "
                             "choose another run_dir")
        if first:
            print(f"{run.path} is complete (to train again, set another run_dir=…):")
            _print_results(config, run, task, run.read_summary(), store.load(run.model))
        return 0
    if first:
        run.lock()  # a new directory exists only now

    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(jax.set_mesh(mesh))
        # The state: from a checkpoint of this run, from another model, or random.
        state = None
        checkpoints = cleanup.enter_context(
            contextlib.closing(Checkpoints(run.checkpoints, config.train.keep)))
        run_state, iterator = RunState(), iter(task.batches)
        if checkpoint := checkpoints.latest(training.abstract_state):
            state, notes = checkpoint
            if notes.pop("corpus") != task.fingerprint and not resume:
                raise InputError(f"{task.key}: {task.source} is not the data that {run.path} was trained on; "
                                 "choose another run_dir, or --resume to continue with this data")
            iterator.set_state(_position(notes.pop("data"), iterator.get_state()["size"], run))
            run_state = RunState(**{"tokens": notes["step"] * task.tokens} | notes)
        for line in accelerators.unsupported({device.platform for device in jax.local_devices()}):
            notify(f"note: {line}")
        budgeted = None if config.train.minutes is None else run.read_steps()
        steps = min(config.train.steps, budgeted or config.train.steps)
        run.check_updates(run_state.step, steps)
        notify(f"{name}: {config.model.family}, {_parameters(task, training.abstract_state.params)}; "
               f"{task.source}: {task.size}; {jax.device_count()} × {jax.devices()[0].device_kind}"
               + (f"; resuming from step {run_state.step}" if run_state.step else ""), flush=True)

        measures = config.train.minutes is not None and budgeted is None
        if advice := task.advice(steps, at_most=measures):
            notify(f"note: {advice}", flush=True)
        if measures:
            steps = _steps_within_budget(config, run, task, training, begin, first=first)
        if steps != config.train.steps:
            training = task.prepare(start_from, steps)
        if state is None:
            state = training.make_state()
        update, abstract_state = training.update, training.abstract_state
        del training, start_from  # they hold a second copy of the weights

        # The training loop.
        metrics_log = cleanup.enter_context(contextlib.closing(MetricsLog(
            run.metrics, config.log, from_step=run_state.step, name=name,
            settings=config_lib.to_dict(config)))) if first else None
        progress = cleanup.enter_context(contextlib.closing(
            Progress(steps, run_state.step, task.loss_unit.format, unit=task.unit, show=first)))
        trainer = Trainer(dataclasses.replace(config.train, steps=steps), task, update, checkpoints, run,
                          metrics_log, progress)
        with distributed.signals_deferred(progress.is_compiling):
            state, run_state = trainer.train(state, iterator, run_state)
        if run_state.step < steps:
            notify(f"stopped and saved at step {run_state.step} of {steps}; "
                   f"the same command resumes from there", flush=True)
            return distributed.stop_status()
        params, exported = _exported(config, checkpoints, state, abstract_state, run_state)
        params = _gathered(params, mesh)
        if first:
            cleanup.close()  # closes the checkpoints
            model = task.network.merge(params)
            with waiting("writing the model and the results"):
                summary = _finish(config, run, task, model, exported, run_state, mesh, command)
            _print_results(config, run, task, summary, model)
    return 0


def _steps_within_budget(config: ExperimentConfig, run: RunDirectory, task: Task, training: Training,
                         begin: float, *, first: bool) -> int:
    """Decides how many updates fit into `train.minutes`, and stores that for resuming."""
    try:
        with (contextlib.closing(Progress(config.train.steps, 0, task.loss_unit.format, show=first)
                                 ) as progress, progress.activity("measuring the speed")):
            steps, costs = decide_steps(task, training, config.train, begin)
    except KeyboardInterrupt:
        if first:
            print("nothing is trained yet; the same command starts again", file=sys.stderr)
        raise
    if first:
        why = "; train.steps allows no more" if steps == config.train.steps else ""
        rate = f"{1 / costs.update:.3g} per second"
        print(f"{config.train.minutes:g} minutes: {steps:,} updates at {rate}{why}", flush=True)
        if note := few_updates(steps, costs, config.train, config.optimizer.warmup_steps):
            print(f"note: {note}", flush=True)
        run.write_steps(steps, 1 / costs.update)
    return steps


def _finish(config: ExperimentConfig, run: RunDirectory, task: Task, model: Any, exported: int,
            run_state: RunState, mesh: jax.sharding.Mesh, command: str) -> dict[str, Any]:
    """Writes model/, loss.png and, last, summary.json, which marks the run as complete."""
    params = split_params(model)[1]
    n_parameters = parameter_count(params)
    summary = {
        "final_valid_loss": run_state.valid_loss, "best_valid_loss": run_state.best_loss,
        **task.loss_unit.columns(run_state.valid_loss, "final_valid_"),
        **task.loss_unit.columns(run_state.best_loss, "best_valid_"),
        "best_step": run_state.best_step, "steps": run_state.step, "exported_step": exported,
        "parameters": n_parameters, "trained_parameters": parameter_count(select(params, task.loss.trained)),
        "tokens": run_state.tokens,
        "seconds": round(run_state.seconds, 1), "corpus": task.fingerprint, **task.summarize(model),
        "mesh": dict(mesh.shape), **provenance(config.seed)}
    store.save(model, run.model, report.card_info(run.name, config, task, summary, command))
    baselines = report.baselines(summary, config.report)
    report.plot_losses(read_metrics(run.metrics), run.figure,
                       f"{run.name}: {n_parameters:,} parameters on {task.source}", baselines,
                       task.loss_unit)
    run.write_summary(summary)
    return summary


def _print_results(config: ExperimentConfig, run: RunDirectory, task: Task, summary: dict[str, Any],
                   model: Any) -> None:
    """Prints the results of a run."""
    print(f"\n{report.losses_table(summary, config.report, task.loss_unit)}\n")
    trigram = summary.get("trigram_valid_loss")
    if trigram is not None and trigram < summary["best_valid_loss"]:
        remedy = ("it overfits, and needs more text" if summary["best_step"] < summary["steps"] else
                  "train it on more text" if task.advice(config.train.steps) else  # as the note at the start
                  "train it longer, or on more text")
        print(f"note: byte trigrams predict this text better than the network: {remedy}\n")
    if config.report.prompts:
        with waiting("sampling the report's texts"):
            print(f"{report.continuations(model, config.report, config.seed)}\n")
    print(f"{summary['tokens']:,} {task.unit} in {summary['seconds']:.0f} s; model: {run.model}; "
          f"figure: {run.figure}")


# ---------------------------------------------------------------------------------------------


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line("tilelli train", __doc__, ExperimentConfig, "demo",
                                     "train.steps=50", main_keys=MAIN_KEYS)
    parser.add_argument("--resume", action="store_true",
                        help="resume the run in run_dir even if settings have changed")
    parser.add_argument("--distributed", action="store_true",
                        help="run as one of several processes (see launch/README.md)")
    return parser.parse_intermixed_args(argv)


def _command(argv: Sequence[str], config: ExperimentConfig) -> str:
    """Returns the command of the run, for the model card; it always names the data."""
    task = _task_class(config)
    source = getattr(config, task.key.partition(".")[0]).source
    is_given = any(word.startswith(f"{task.key}=") for word in argv)
    return shlex.join(["tilelli", "train", *argv, *([] if is_given else [f"{task.key}={source}"])])


def _task_class(config: ExperimentConfig) -> type[Task]:
    return (ChatTask if config.chat is not None else
            AutoencoderTask if config.model.family == "sae" else TextTask)


def _without_reference(config: ExperimentConfig, overrides: Sequence[str]) -> ExperimentConfig:
    """Drops the reference loss if the overrides change the data that it was measured on."""
    keys = {override.partition("=")[0] for override in overrides}
    if config.report.reference is None or "report.reference" in keys or not any(
            key.partition(".")[0] == "data" for key in keys):
        return config
    return dataclasses.replace(config, report=dataclasses.replace(
        config.report, reference=None, reference_name=""))


def _start(config: ExperimentConfig) -> Any:
    """Loads the model that the run starts from; adds an abstain head of zeros if configured and missing.

    Raises:
        InputError: it cannot be read, or is not the network of the configuration.
    """
    model = store.load(config.train.init_from, config.compute)
    if is_packed(model):
        raise InputError(f"train.init_from: {config.train.init_from}: expected full-precision weights, which "
                         "training updates, found packed ones")
    if getattr(config.model, "abstain_head", False) and getattr(model, "abstain", None) is None:
        model = attach_head(model, new_head(model.config.d_model))
    if model.config != config.model:
        key, (start_value, own_value) = next(iter(config_lib.differences(model.config, config.model).items()))
        raise InputError(f"train.init_from: {config.train.init_from} has {key} {start_value}, "
                         f"and model.{key} is {own_value}")
    return model


def _parameters(task: Task, params: Any) -> str:
    """Describes the number of parameters, and how many are trained."""
    total, trained = parameter_count(params), parameter_count(select(params, task.loss.trained))
    return f"{total:,} parameters" + (f", of which {trained:,} are trained" if trained < total else "")


def _position(state: dict[str, Any], size: float, run: RunDirectory) -> dict[str, Any]:
    """Returns a checkpoint's position in the data; older checkpoints count config.yaml's batches."""
    if "next_index" not in state:
        return state
    batch_size = config_lib.load(ExperimentConfig, run.config).train.batch_size
    return {"examples": state["next_index"] * batch_size, "size": size}


def _exported(config: ExperimentConfig, checkpoints: Checkpoints, state: TrainState,
              abstract_state: TrainState, run_state: RunState) -> tuple[Any, int]:
    """Returns the parameters to write to model/, and their step."""
    if config.train.export == "best" and run_state.best_step != run_state.step:
        jax.tree.map(lambda a: a.delete(), state.opt_state)  # makes room
        try:
            return checkpoints.restore(run_state.best_step, abstract_state).state.params, run_state.best_step
        except InputError as error:
            log.warning("%s; model/ gets the last weights, not the best ones", error)
    return state.params, run_state.step


def _gathered(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Gathers the parameters from all devices and processes onto this process's first device."""
    gather = distributed.compile_barrier(jax.jit(lambda params: params, out_shardings=replicated(mesh)))
    gathered = gather(params)
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a.addressable_data(0))), gathered)


if __name__ == "__main__":
    sys.exit(main())
