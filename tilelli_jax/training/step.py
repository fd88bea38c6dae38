"""One update as a pure function, and the training state that it maps to the next."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from tilelli_jax.errors import InputError
from tilelli_jax.loading.store import build
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import replicated, tree_shardings
from tilelli_jax.training.distributed import compile_barrier
from tilelli_jax.training.groups import merge, select
from tilelli_jax.training.loss import Batch, Loss, Metrics
from tilelli_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule

Update = Callable[["TrainState", Batch, Any], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """All arrays that change during training."""

    step: jax.Array  # int32: updates done
    params: Any  # nested dict of f32, the layers stacked
    opt_state: Any
    key: jax.Array  # uint32 [2]: raw key data, folded with the step where randomness is used
    loss_state: Any = ()  # arrays of `Loss.initial_loss_state`; empty for most networks


class Network(NamedTuple):
    """A model without its parameters: the static graph, and buffers that are stored but not trained."""

    graph: Any
    buffers: Any

    def merge(self, params: Any) -> Any:
        return nnx.merge(self.graph, params, self.buffers)


def split_params(model: Any) -> tuple[Network, Any]:
    """Splits a model into its network and its trainable parameters, a nested dict."""
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, buffers = states
    return Network(graph, nnx.to_pure_dict(buffers)), nnx.to_pure_dict(params)


class Training(NamedTuple):
    """The components of training a network."""

    network: Network
    abstract_state: TrainState  # shapes, types and shardings: all that restoring a checkpoint needs
    make_state: Callable[[], TrainState]
    update: Update


def make_training(config: Any, compute: ComputeConfig, optimizer: OptimizerConfig, *, steps: int,
                  loss: Loss, seed: int, mesh: Mesh, model: Any = None) -> Training:
    """Combines network, optimiser, schedule and update.

    Call `make_state` and `update` with `mesh` set (`jax.set_mesh`).

    Args:
        steps: length of the run in updates; the schedule spans it.
        model: start from its weights; None: random weights.
    """
    transformation = make_optimizer(optimizer, steps)
    network, abstract_state, make_state = init_state(config, compute, transformation, loss, seed, mesh, model)
    update = make_train_step(network, transformation, loss, make_schedule(optimizer, steps),
                             jax.tree.map(lambda leaf: leaf.sharding, abstract_state), mesh)
    return Training(network, abstract_state, make_state, update)


def init_state(config: Any, compute: ComputeConfig, optimizer: optax.GradientTransformation, loss: Loss,
               seed: int, mesh: Mesh, model: Any = None,
               ) -> tuple[Network, TrainState, Callable[[], TrainState]]:
    """Returns the network, the abstract state before the first update, and a function that creates it.

    The abstract state has shapes, types and shardings only, which is all that restoring a checkpoint needs.
    The created arrays follow the sharding rules; their numbers are the same on any mesh.

    Args:
        model: start from its weights; None: random weights.
    """
    key, init_key = jax.random.split(jax.random.key(seed))
    network, _ = split_params(nnx.eval_shape(lambda: build(config, 0, compute)))
    concrete = network
    if model is None:
        make: Callable[[Any], Any] = lambda key: split_params(build(config, key, compute))[1]  # noqa: E731
        start = init_key
        if jax.tree.leaves(network.buffers):  # buffers do not depend on the seed
            concrete = split_params(build(config, 0, compute))[0]
    else:
        concrete, start = split_params(model)
        make = lambda params: params  # noqa: E731
    # Buffers become constants of the program, which may be compiled for devices of another machine.
    network = network._replace(buffers=jax.tree.map(np.asarray, concrete.buffers))

    def init(start: Any, key: jax.Array) -> TrainState:
        params = make(start)
        return TrainState(jnp.int32(0), params, optimizer.init(select(params, loss.trained)),
                          jax.random.key_data(key),
                          jax.tree.map(jnp.asarray, loss.initial_loss_state(params)))

    shapes = jax.eval_shape(init, start, key)
    shardings = tree_shardings(shapes, mesh)
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes, shardings)
    make_state = compile_barrier(jax.jit(init, out_shardings=shardings))
    return network, abstract_state, lambda: make_state(start, key)


def make_train_step(network: Network, optimizer: optax.GradientTransformation, loss: Loss,
                    schedule: optax.Schedule, shardings: TrainState, mesh: Mesh) -> Update:
    """Returns the jitted `step(state, batch, index) -> state, metrics`; the state's buffers are donated.

    The batch's arrays are `[parts, batch / parts, …]`; gradients are averaged over the parts. `index` is the
    number of updates that the state should have had. An update whose loss, gradient or result is not finite
    leaves the state unchanged. So does every later update, because its index no longer matches: the state
    that caused the failure can be inspected however late the failure is noticed.

    Metrics: those of the loss, `learning_rate`, `grad_norm`, `update_norm`, `finite`.
    """
    def over_parts(params: Any, batch: Batch, key: jax.Array, extra_batch: Batch) -> tuple[Metrics, Any]:
        trained = select(params, loss.trained)

        def value_and_grad(batch: Batch, key: jax.Array) -> tuple[Metrics, Any]:
            def objective(trained: Any) -> tuple[jax.Array, Metrics]:
                return loss(network.merge(merge(params, trained)), batch | extra_batch, key)
            (total, metrics), grads = jax.value_and_grad(objective, has_aux=True)(trained)
            return metrics | {"objective": total}, grads

        parts = jax.tree.leaves(batch)[0].shape[0]
        if parts == 1:
            return value_and_grad(jax.tree.map(lambda a: a[0], batch), key)

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(*part)), None
        keys = jax.random.split(key, parts)
        first = jax.eval_shape(value_and_grad, jax.tree.map(lambda a: a[0], batch), key)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        total, _ = jax.lax.scan(add, zero, (batch, keys))
        return jax.tree.map(lambda leaf: leaf / parts, total)

    def step(state: TrainState, batch: Batch, index: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        metrics, grads = over_parts(state.params, batch, key, loss.extra_batch(state.loss_state, state.step))
        trained = select(state.params, loss.trained)
        grads = loss.transform_grads(trained, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
        finite = jnp.isfinite(metrics["objective"] + grad_norm + update_norm)
        params = merge(state.params, optax.apply_updates(trained, updates))
        params, loss_state, metrics = loss.post_update(params, state.loss_state, metrics)
        new = state._replace(step=state.step + 1, params=params, opt_state=opt_state, loss_state=loss_state)
        applies = finite & (state.step == index)
        new = jax.tree.map(lambda new, old: jnp.where(applies, new, old), new, state)
        return new, metrics | {"learning_rate": jnp.asarray(schedule(state.step)),
                               "grad_norm": grad_norm, "update_norm": update_norm, "finite": finite}

    return compile_barrier(jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh))))


def check_memory(abstract_state: TrainState) -> None:
    """Raises InputError if a device has less memory than its part of the state needs."""
    needed = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                 for leaf in jax.tree.leaves(abstract_state))
    device = jax.local_devices()[0]
    available = (device.memory_stats() or {}).get("bytes_limit")
    if available is None and device.platform == "cpu" and hasattr(os, "sysconf"):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    if available is not None and needed > available:
        raise InputError(f"model: its parameters and optimiser take {needed / 2**30:,.1f} GiB on each "
                         f"device, which has {available / 2**30:,.1f}; choose a smaller model or a larger "
                         f"mesh.fsdp")


def parameter_count(params: Any) -> int:
    """Returns the number of parameters in a tree, counting each element."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
