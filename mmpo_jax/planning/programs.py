"""The programs that a recipe will run: the library's own, lowered for shapes on devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.feedback.labeler import answer_probabilities
from mmpo_jax.models.attention import PLATFORM_BACKENDS
from mmpo_jax.models.lora import cast_params
from mmpo_jax.objectives.terms import needs
from mmpo_jax.planning import abstract
from mmpo_jax.planning.abstract import Sizes, local_bytes
from mmpo_jax.planning.counts import (
    Computation,
    forward_work,
    kept_bytes,
    train_work,
)
from mmpo_jax.planning.opened import Opened
from mmpo_jax.planning.teaching import Teaching
from mmpo_jax.planning.work import Work
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.training import MovingReference, Training
from mmpo_jax.reward_models.rewards import reward_batch
from mmpo_jax.scoring.log_probs import score_batch
from mmpo_jax.training.losses import (
    compared_with,
    contexts_of,
    make_loss,
    needs_reference,
    recipe_terms,
)
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.plan import micro_batch_size
from mmpo_jax.training.step import make_step
from mmpo_jax.training.validation import make_forward

BESIDE = "beside"
"""Name of what a device holds beside the arguments of a program: the training it samples for."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a recipe."""

    name: str
    """What it does, "train step"."""
    checkpoint: str
    """Of which model."""
    mesh: Mesh
    dtype: str
    """What it computes in."""
    shape: str
    """Its static shape, for people."""
    lower: Callable[[], Any]
    """Lowers it, once the mesh is in use."""
    work: Work
    """Of one run of it; of a decoding one of one token of every place."""
    held: Mapping[str, float]
    """What a device holds while it runs, by name: "parameters", "optimizer", "batch", ..., and
    `BESIDE`, which no compiler knows of."""
    gives: Mapping[str, float]
    """What one run brings: "pairs", "prompts", "tokens", "responses", "questions"."""
    kept: float = 0.0
    """Bytes that a device keeps for the backward pass, roughly."""
    loops: int = 1
    """Trips of a loop that data end, of which `work` and `gives` are one."""
    stays: float = 0.0
    """Bytes that lie on a device between two steps of a training, but for weights that what samples
    in between reads as they are."""


def backend_of(opened: Opened, mesh: Mesh, dtype: Any) -> str:
    """What computes attention that kernels know on a mesh: "splash" or "xla"."""
    asked = opened.model.attention
    chosen = PLATFORM_BACKENDS.get(mesh.devices.flat[0].platform, "xla")
    chosen = chosen if asked == "auto" else asked
    kernel = chosen == "splash" and jnp.dtype(dtype).name != "float16"
    return "splash" if kernel else "xla"


def computation_of(opened: Opened, mesh: Mesh, dtype: Any) -> Computation:
    itemsize = jnp.dtype(dtype).itemsize
    return Computation(opened.model, mesh, itemsize, backend_of(opened, mesh, dtype))


def scoring(
    name: str, opened: Opened, mesh: Mesh, sizes: Sizes, dtype: str, per_token: bool = False
) -> Program:
    """Log-probs of responses: the reference of training, `mmpo score`, implicit rewards."""
    params = abstract.params(opened.model, mesh, opened.dtype, opened.quantization)
    batch = abstract.batch(opened.model, sizes, mesh)
    return Program(
        name,
        opened.name,
        mesh,
        dtype,
        told_of(sizes),
        lambda: score_batch.lower(opened.model, params, batch, dtype, per_token),
        forward_work(computation_of(opened, mesh, dtype), sizes),
        {"parameters": local_bytes(params), "batch": local_bytes(batch)},
        {"rows": sizes.rows, "tokens": sizes.tokens},
    )


def rewarding(opened: Opened, mesh: Mesh, sizes: Sizes, dtype: str) -> Program:
    """Rewards of responses, with their critiques if these are read."""
    params = abstract.params(opened.model, mesh, opened.dtype, opened.quantization)
    batch = abstract.batch(opened.model, sizes, mesh)
    return Program(
        "rewards",
        opened.name,
        mesh,
        dtype,
        told_of(sizes),
        lambda: reward_batch.lower(opened.model, params, batch, dtype),
        forward_work(computation_of(opened, mesh, dtype), sizes, head=False),
        {"parameters": local_bytes(params), "batch": local_bytes(batch)},
        {"rewards": sizes.rows * sizes.responses, "tokens": sizes.tokens},
    )


def labelling(opened: Opened, mesh: Mesh, sizes: Sizes) -> Program:
    """Probabilities of yes and no after every question about an image."""
    dtype = opened.inference_dtype
    params = abstract.params(opened.model, mesh, opened.dtype, opened.quantization)
    batch = abstract.batch(opened.model, sizes, mesh)
    return Program(
        "labelling",
        opened.name,
        mesh,
        dtype.name,
        told_of(sizes),
        lambda: answer_probabilities.lower(opened.model, params, batch, (1,), (2,)),
        forward_work(computation_of(opened, mesh, dtype), sizes, last_only=True),
        {"parameters": local_bytes(params), "batch": local_bytes(batch)},
        {"claims": sizes.rows * sizes.responses, "tokens": sizes.tokens},
    )


def training(
    opened: Opened,
    mesh: Mesh,
    config: Training,
    sizes: Sizes,
    rollout: Rollout | None = None,
    teaching: Teaching | None = None,
) -> Program:
    """One update.

    Args:
      opened: what training starts from.
      mesh: the devices.
      config: the recipe's section.
      sizes: of a record in its main context; rows are not read.
      rollout: how responses are sampled, if they are.
      teaching: by whom, if anybody teaches.
    """
    micro = micro_batch_size(config, mesh)
    count = config.batch_size // micro
    terms = recipe_terms(config)
    contexts = contexts_of(config)
    temperature = 1.0 if rollout is None else rollout.temperature
    balance = config.router_aux_loss_coef
    teacher = None if teaching is None else teaching.model
    loss = make_loss(opened.model, terms, contexts, config.remat, temperature, balance, teacher)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 1000)
    optimizer = make_optimizer(config.optimizer, schedule, opened.model.config.decoder.vocab_size)
    kind = compared_with(config, rollout)
    state = abstract.train_state(opened.model, config, loss, optimizer, mesh, opened.dtype, kind)
    dtype = jnp.dtype(config.compute_dtype)
    known = None
    if kind.type in ("cached", "given"):
        known = "log_probs" if "reference_tokens" in needs(terms) else "sums"
    fields = ("old_log_probs",) if rollout is not None and rollout.steps > 1 else ()
    sizes = dataclasses.replace(sizes, rows=micro)
    batch = abstract.train_batch(
        opened.model,
        sizes,
        mesh,
        terms,
        contexts,
        reference=known,
        fields=fields,
        micro_batches=count,
    )
    taught = None if teaching is None else teaching.params(mesh)
    if teaching is not None:
        batch = dataclasses.replace(batch, teacher=teaching.batch(mesh, micro, count))
    dropout = config.lora.dropout if config.lora else 0.0
    follows = kind if isinstance(kind, MovingReference) else None

    def update(before: TrainState, given: TrainBatch, taught: Any) -> Any:
        options = (dtype, dropout, 0, follows, taught)
        return make_step(loss, optimizer, schedule, state, *options)(before, given)

    def lower() -> Any:
        return jax.jit(update, donate_argnums=0).lower(state, batch, taught)

    params, computation = state.params | state.frozen, computation_of(opened, mesh, dtype)
    in_rows = dataclasses.replace(sizes, rows=micro * len(contexts))
    work = train_work(
        computation,
        params,
        state.params.keys(),
        in_rows,
        count,
        config.remat,
        reference=bool(state.reference) and needs_reference(terms),
        moments=local_bytes(state.optimizer),
    )
    told = told_of(in_rows) + (f", {count} micro-batches" if count > 1 else "")
    if teaching is not None:
        theirs = computation_of(teaching.opened, mesh, dtype)
        work += teaching.work(theirs, micro).times(count)
        shown = dataclasses.replace(teaching.sizes, rows=micro)
        told += f", taught at {told_of(shown)}"
    held = {
        "parameters": local_bytes([state.params, state.frozen]),
        "optimizer": local_bytes(state.optimizer),
        "reference": local_bytes(state.reference),
        "teacher": local_bytes(taught),
        "batch": local_bytes(batch),
    }
    if waiting := local_bytes(state.optimizer, on_host=True):
        told += f", {waiting / 2**30:.2f} GiB a device on its host"
    gives = {_unit(config): config.batch_size, "tokens": in_rows.tokens * count}
    kept = kept_bytes(computation, params, state.params.keys(), in_rows, config.remat)
    read = flatten(jax.eval_shape(lambda tree: cast_params(tree, dtype), unflatten(params)))
    as_they_are = [leaf for path, leaf in params.items() if read[path].dtype == leaf.dtype]
    stays = sum(held.values()) - held["batch"] - local_bytes(as_they_are)
    return Program(
        *("train step", opened.name, mesh, dtype.name, told, lower, work, held, gives, kept),
        stays=stays,
    )


def _unit(config: Training) -> str:
    """What `batch_size` counts: pairs, prompts that are sampled after, or rows of other kinds."""
    kinds = {term.objective.kind for term in recipe_terms(config)}
    if "rollouts" in kinds:
        return "prompts"
    return "pairs" if kinds & {"pairs", "rewards"} else "rows"


def validation(opened: Opened, mesh: Mesh, config: Training, sizes: Sizes) -> Program:
    """The outputs of held-out rows under the state of a training."""
    terms, contexts = recipe_terms(config), contexts_of(config)
    loss = make_loss(opened.model, terms, contexts)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 1000)
    optimizer = make_optimizer(config.optimizer, schedule, opened.model.config.decoder.vocab_size)
    kind = compared_with(config)
    state = abstract.train_state(opened.model, config, loss, optimizer, mesh, opened.dtype, kind)
    sizes = dataclasses.replace(sizes, rows=micro_batch_size(config, mesh))
    batch = abstract.train_batch(opened.model, sizes, mesh, terms, contexts, micro_batches=None)
    forward: Any = make_forward(loss, jnp.dtype(config.compute_dtype))
    in_rows = dataclasses.replace(sizes, rows=sizes.rows * len(contexts))
    held = {
        "parameters": local_bytes([state.params, state.frozen, state.reference]),
        "optimizer": local_bytes(state.optimizer),
        "batch": local_bytes(batch),
    }
    computation = computation_of(opened, mesh, config.compute_dtype)
    return Program(
        "validation",
        opened.name,
        mesh,
        config.compute_dtype,
        told_of(in_rows),
        lambda: forward.lower(state, batch),
        forward_work(computation, in_rows),
        held,
        {"rows": sizes.rows, "tokens": in_rows.tokens},
    )


def told_of(sizes: Sizes) -> str:
    """The static shape of a program, for people."""
    told = f"{sizes.rows} x {sizes.prompt}"
    if sizes.responses:
        told += f" + {sizes.responses} x {sizes.response}"
    return told + (f", {counted(sizes.slots, 'slot')}" if sizes.slots else "")


def counted(count: int, what: str) -> str:
    """The number with its noun: "1 slot", "2 slots"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
