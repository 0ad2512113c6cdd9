"""What programs are given, as shapes on devices: batches, parameters, the state of a training."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.contexts import MAIN
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.generation.places import row_spec
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.layout import pad_size
from mmpo_jax.models.lora import add_adapters, is_exact
from mmpo_jax.models.model import Model
from mmpo_jax.models.quantized import Quantization, itemsize
from mmpo_jax.models.quantized_base import quantize_base
from mmpo_jax.objectives.registry import is_field
from mmpo_jax.objectives.terms import Term, needs, rows_read
from mmpo_jax.parallel.mesh import batch_spec, placed_shapes
from mmpo_jax.recipes.training import Reference, Training
from mmpo_jax.training.losses import Loss
from mmpo_jax.training.offload import is_on_host
from mmpo_jax.training.rounding import widened
from mmpo_jax.training.sharding import optimizer_shardings
from mmpo_jax.training.step import trainable_paths

TOKEN_FIELDS = ("token_weights", "phrases", "changed", "turn", "critique")
"""Fields with a number for every token and not for every response."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static shapes of a batch."""

    rows: int
    """B, over all devices."""
    prompt: int
    """P."""
    responses: int = 0
    """R."""
    response: int = 0
    """T."""
    slots: int = 0
    """I, before it is padded."""

    @property
    def padded_slots(self) -> int:
        return pad_size(self.slots)

    @property
    def tokens(self) -> int:
        """Tokens of the decoder, padding included."""
        return self.rows * (self.prompt + self.responses * self.response)


def array(shape: Sequence[int], dtype: Any, mesh: Mesh, spec: Any) -> jax.ShapeDtypeStruct:
    """An array on a mesh."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec))


def replicated(shape: Sequence[int], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """An array that every device has whole."""
    return array(shape, dtype, mesh, PartitionSpec())


def batch(model: Model, sizes: Sizes, mesh: Mesh, micro_batches: int | None = None) -> Batch:
    """A batch of a model, split over the mesh as `put_batch` does it.

    Args:
      model: the architecture.
      sizes: of one micro-batch.
      mesh: the devices.
      micro_batches: length of the leading axis that a train step takes; None for no such axis.
    """
    b, p, r, t, i = sizes.rows, sizes.prompt, sizes.responses, sizes.response, sizes.padded_slots
    images = model.family.images
    width = images.vectors if images else 1
    slot = images.slot_shape(model.config) if images else ()
    patches = images.describe(model.config, [], i) if images else {}
    lead: tuple[int, ...] = ()
    spec = batch_spec(mesh)
    if micro_batches is not None:
        lead, spec = (micro_batches,), PartitionSpec(None, *spec)

    def rows(shape: Sequence[int], dtype: Any) -> Any:
        return array((*lead, b, *shape), dtype, mesh, spec)

    return Batch(
        prompt_ids=rows((p,), jnp.int32),
        prompt_mask=rows((p,), bool),
        positions=rows((model.config.decoder.position_axes, p), jnp.int32),
        next_position=rows((), jnp.int32),
        pixel_values=rows((i, *slot), jnp.float32),
        patches={name: rows(patch.shape, patch.dtype) for name, patch in patches.items()},
        feature_index=rows((p, width), jnp.int32),
        feature_weight=rows((p, width), jnp.float32),
        response_ids=rows((r, t), jnp.int32),
        response_mask=rows((r, t), bool),
        loss_mask=rows((r, t), bool),
        weights=rows((), jnp.float32),
    )


def train_batch(
    model: Model,
    sizes: Sizes,
    mesh: Mesh,
    terms: Sequence[Term],
    contexts: Sequence[str] = (MAIN,),
    *,
    reference: str | None = None,
    fields: Collection[str] = (),
    micro_batches: int | None = 1,
) -> TrainBatch:
    """What a train step consumes.

    Args:
      model: the architecture.
      sizes: of a micro-batch; rows are records.
      mesh: the devices.
      terms: the objectives, which say what fields there are.
      contexts: of every record.
      reference: "sums" or "log_probs" of a reference that was computed before; None for none.
      fields: further ones, with a number for every token.
      micro_batches: see `batch`.
    """
    lead: tuple[int, ...] = ()
    spec = batch_spec(mesh)
    if micro_batches is not None:
        lead, spec = (micro_batches,), PartitionSpec(None, *spec)
    n, s, t = sizes.rows, sizes.responses, sizes.response

    def numbers(rows: int, per_token: bool) -> Any:
        shape = (*lead, rows, s, t) if per_token else (*lead, rows, s)
        return array(shape, jnp.float32, mesh, spec)

    names = {"rank", *filter(is_field, needs(terms))}  # which all rows have
    made = {name: numbers(n, name in TOKEN_FIELDS) for name in sorted(names)}
    made |= {name: numbers(n, True) for name in fields}
    if rows_read(terms).mismatched:
        made["mismatched"] = numbers(n, False)
    rows = n * len(contexts)
    prompts = batch(model, dataclasses.replace(sizes, rows=rows), mesh, micro_batches)
    known = {} if reference is None else {reference: numbers(rows, reference == "log_probs")}
    return TrainBatch(prompts, known, made)


@functools.cache
def shapes_of(model: Model) -> Any:
    """The parameters' shapes, found once for all that is asked about a model."""
    return model.abstract_params()


def params(model: Model, mesh: Mesh, dtype: Any, quantization: Quantization | None = None) -> Any:
    """The parameters by the model's rules, all of one dtype but for kernels that are quantised."""
    return placed_shapes(_loaded(model, dtype, quantization), model.rules, mesh)


def _loaded(model: Model, dtype: Any, quantization: Quantization | None) -> Any:
    """The parameters' shapes as they are read from files of a dtype."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes_of(model))
    if quantization is None:
        return shapes
    return jax.eval_shape(lambda shapes: quantize_base(shapes, model, quantization), shapes)


def train_state(
    model: Model,
    config: Training,
    loss: Loss,
    optimizer: Any,
    mesh: Mesh,
    dtype: Any,
    reference: Reference,
) -> TrainState:
    """The state as `training.step.create_state` makes it.

    Args:
      model: the architecture.
      config: the recipe's training section.
      loss: of its objectives.
      optimizer: optax transformation.
      mesh: the devices.
      dtype: of what training starts from, which frozen parameters keep.
      reference: what the policy is compared with.
    """
    start = _loaded(model, dtype, config.quantization)
    if config.lora is not None:
        lora, frozen_paths = config.lora, config.freeze
        start = jax.eval_shape(
            lambda start: add_adapters(start, model, lora, frozen_paths, 0), start
        )
    flat = flatten(placed_shapes(start, model.rules, mesh))
    trained = {
        path: jax.ShapeDtypeStruct(
            flat[path].shape, jnp.dtype(config.param_dtype), sharding=flat[path].sharding
        )
        for path in trainable_paths(list(flat), config.freeze)
    }
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    moments = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(lambda params: optimizer.init(widened(params)), trained),
        optimizer_shardings(optimizer, trained, mesh),
    )
    running = {"online": jnp.dtype(config.compute_dtype), "ema": jnp.dtype(jnp.float32)}
    followed = {}
    if reference.type in running:
        followed = {
            path: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype if is_exact(path) else running[reference.type],
                sharding=leaf.sharding,
            )
            for path, leaf in trained.items()
        }
    keeps = {name: replicated((), jnp.float32, mesh) for name in loss.state}
    step = replicated((), jnp.int32, mesh)
    halted = replicated((), jnp.bool_, mesh)
    parts: Any = step, trained, frozen, moments, followed, keeps, halted  # shapes, no arrays
    return TrainState(*parts)


def on_rows(tree: Any, mesh: Mesh) -> Any:
    """Shapes of arrays of rows, placed as generation places them."""
    return jax.tree.map(
        lambda leaf: array(leaf.shape, leaf.dtype, mesh, row_spec(leaf, mesh)), tree
    )


def local_bytes(tree: Any, on_host: bool = False) -> float:
    """Bytes that every device holds of a tree, or that wait for it on the host."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize(leaf.dtype)
            for leaf in jax.tree.leaves(tree)
            if is_on_host(leaf) == on_host
        )
    )
