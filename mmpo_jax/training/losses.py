"""Binds the objectives of a recipe to a model: parameters and a batch to responses and a loss."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mmpo_jax.data.contexts import MAIN, OTHER_IMAGE
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.models.log_probs import LOADS, REWARDS, Teacher, response_rewards, response_statistics
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.routing import load_balancing_loss
from mmpo_jax.objectives.registry import REFERENCES, STATISTICS, State
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, WeightedSum, mean
from mmpo_jax.objectives.terms import (
    Metrics,
    Term,
    coupled,
    first_state,
    loss_sums,
    metrics_of,
    needs,
    reads_log_probs,
    rows_read,
    weighted_loss,
)
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.teacher import SelfTeacher
from mmpo_jax.recipes.training import NoReference, Reference, Training

AUX_LOSS = "aux_loss"
"""Name of the load-balancing loss among metrics, before its weight; TRL's."""

Outputs = dict[str, Float[Array, "B S ..."]]
"""name -> float32[B, S, T], `REWARDS` [B, S] and `LOADS` [B, 2, E], as `response_statistics` gives
them."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a train step differentiates, in two halves: the model, and what follows from it."""

    forward: Callable[..., Any]
    """(parameters, the reference's, batch, a teacher's = None) -> outputs, pytree of arrays with
    leading rows."""
    sums: Callable[[Any, Any, State], tuple[list[Sums], State]]
    """(outputs, batch, state) -> (sums of every term, new state); see `terms.loss_sums`."""
    value: Callable[[Sequence[Sums]], Float[Array, ""]]
    """Sums of every term -> the loss."""
    metrics: Callable[[Sequence[Sums]], Metrics]
    """Sums of every term -> metrics."""
    coupled: bool = False
    """Whether the loss of a row depends on the others of the batch."""
    state: State = dataclasses.field(default_factory=dict)
    """What the terms keep from step to step, at the start."""


def make_loss(
    model: Model,
    terms: Sequence[Term],
    contexts: Sequence[str] = (MAIN,),
    remat: str = "none",
    temperature: float = 1.0,
    balance: float = 0.0,
    teacher: Model | None = None,
) -> Loss:
    """The loss of weighted terms under a model.

    Args:
      model: the architecture.
      terms: as `terms.make_term` gives them.
      contexts: of every record, by name.
      remat, temperature: see `response_log_probs`.
      balance: weight of a mixture's load-balancing loss, which is one of the whole batch; 0 for
        none.
      teacher: architecture of a teacher that is another model; None where it is the reference.
    """
    statistics = needs(terms) & STATISTICS.keys()
    partners = other_images(contexts)
    speaks, compares = reads_log_probs(terms), needs_reference(terms)
    divergence = rows_read(terms).divergence

    def taught(
        reference: Params | None, batch: TrainBatch, params: Params | None
    ) -> Teacher | None:
        if divergence is None:
            return None
        assert batch.teacher is not None
        how = divergence.beta, divergence.top_k
        if teacher is not None:
            assert params is not None
            return Teacher(teacher, params, batch.teacher, *how)
        assert reference is not None
        return Teacher(model, reference, batch.teacher, *how)

    def forward(
        params: Params,
        reference: Params | None,
        batch: TrainBatch,
        of_teacher: Params | None = None,
    ) -> Outputs:
        if not speaks:  # no log-prob is read, and the model may have no head for them
            return {REWARDS: response_rewards(model, params, batch.prompts, remat=remat)}
        return response_statistics(
            model,
            params,
            batch.prompts,
            statistics,
            reference=reference if compares else None,
            remat=remat,
            partners=partners,
            temperature=temperature,
            rewards="reward_head" in needs(terms),
            loads=balance > 0,
            teacher=taught(reference, batch, of_teacher),
        )

    def sums(outputs: Outputs, batch: TrainBatch, state: State) -> tuple[list[Sums], State]:
        loads = outputs.get(LOADS)
        of_responses = {name: values for name, values in outputs.items() if name != LOADS}
        responses = gather(of_responses, batch, contexts)
        weights = batch.prompts.weights[:: len(contexts)]
        made, state = loss_sums(terms, responses, weights, state)
        if loads is not None:
            top_k = model.config.decoder.experts[0].top_k
            aux = load_balancing_loss(loads, top_k)
            metrics = {AUX_LOSS: WeightedSum(aux, jnp.ones(()))}
            made.append(Sums(balance * aux, jnp.ones(()), metrics))
        return made, state

    def value(sums: Sequence[Sums]) -> Float[Array, ""]:
        of_terms, others = sums[: len(terms)], sums[len(terms) :]
        return weighted_loss(terms, of_terms) + sum(mean(part.loss, part.weight) for part in others)

    def metrics(sums: Sequence[Sums]) -> Metrics:
        others = (part.metrics for part in sums[len(terms) :])
        return functools.reduce(operator.or_, others, metrics_of(terms, sums[: len(terms)]))

    return Loss(forward, sums, value, metrics, coupled(terms) or balance > 0, first_state(terms))


def other_images(contexts: Sequence[str]) -> tuple[int, ...]:
    """For every context the place of the one with the same prompt after the other image; its own
    where there is none."""
    mains = [place for place, name in enumerate(contexts) if name == MAIN]
    others = [place for place, name in enumerate(contexts) if name == OTHER_IMAGE]
    partner = dict(zip(mains, others, strict=False))
    return tuple(partner.get(place, place) for place in range(len(contexts)))


def gather(outputs: Outputs, batch: TrainBatch, contexts: Sequence[str] = (MAIN,)) -> Responses:
    """What the rows of a batch say of every record's responses, [N, S].

    Of the contexts of one name, a response stands in one; in the others its place is empty.
    Responses that were appended from another record are a view of their own and missing in the
    others.

    Args:
      outputs: of the model.
      batch: of N records.
      contexts: of every record, by name.
    """
    parts = dict(outputs)
    if "log_probs" in batch.reference:
        parts["reference_log_probs"] = batch.reference["log_probs"]
    views = {}
    for name in dict.fromkeys(contexts):
        places = [place for place, context in enumerate(contexts) if context == name]

        def added(
            x: Shaped[Array, "B S *T"], places: Sequence[int] = tuple(places)
        ) -> Shaped[Array, "N S *T"]:
            rows = x.reshape(-1, len(contexts), *x.shape[1:])
            return rows[:, np.array(places)].sum(axis=1)

        mask = added(batch.prompts.loss_mask.astype(jnp.int8)) > 0
        tokens = {key: added(value) for key, value in parts.items()}
        reference_tokens = tokens.pop("reference_log_probs", None)
        sums: Float[Array, "N S"] | None = None
        if reference_tokens is not None:
            sums = (reference_tokens * mask).sum(axis=-1)
        elif batch.reference:
            sums = added(batch.reference["sums"])
        rewards = tokens.pop(REWARDS, None)
        log_probs = tokens.pop("log_probs") if "log_probs" in tokens else jnp.zeros(mask.shape)
        views[name] = Responses(
            log_probs, mask, sums, reference_tokens, tokens, batch.fields, {}, rewards
        )
    main = views.pop(MAIN)
    if "mismatched" in batch.fields:
        other = batch.fields["mismatched"][..., None] > 0
        views["mismatched"] = dataclasses.replace(main, mask=main.mask & other)
        main = dataclasses.replace(main, mask=main.mask & ~other)
    return dataclasses.replace(main, views=views)


def needs_reference(terms: Sequence[Term]) -> bool:
    """Whether any of the terms compares with a reference."""
    return bool(needs(terms) & REFERENCES.keys())


def recipe_terms(config: Training) -> list[Term]:
    """The objectives of a recipe's training section."""
    return [section.term() for section in config.objective]


def compared_with(config: Training, rollout: Rollout | None = None) -> Reference:
    """The recipe's reference where anything reads one: objectives, a teacher that is it, or a
    penalty in the rewards of a rollout."""
    taught = isinstance(config.teacher, SelfTeacher)
    penalised = rollout is not None and rollout.reward_kl > 0
    read = needs_reference(recipe_terms(config)) or taught or penalised
    return config.reference if read else NoReference()


def contexts_of(config: Training) -> tuple[str, ...]:
    """The contexts of every record that the objectives read."""
    rows = rows_read(recipe_terms(config))
    return (MAIN,) if rows.other_image is None else (MAIN, OTHER_IMAGE)
