"""A weighted list of objectives on the same responses: the loss of a recipe."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.registry import Objective, Rows, State
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, mean

Metrics = dict[str, Any]
"""name -> float32[], a number of the batch, or a `WeightedSum` over what it counts of the batch."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One objective of the list."""

    objective: Objective
    weight: float
    options: Mapping[str, Any]

    @property
    def rows(self) -> Rows:
        """What it reads beside a record's own responses."""
        return self.objective.rows(self.options)

    @property
    def needs(self) -> frozenset[str]:
        """The objective's needs, what its options need besides, and the views of its rows."""
        needs = {*self.objective.needs, *self.rows.views}
        for option, more in self.objective.option_needs.items():
            if self.uses(option):
                needs.update(more)
        if "scores" in needs and "dimensions" in self.options:
            # Not in `option_needs`, as its values are the names of what is needed.
            needs.remove("scores")
            needs |= {f"scores/{name}" for name in self.options["dimensions"]}
        return frozenset(needs)

    @property
    def coupled(self) -> bool:
        """Whether the loss of a row depends on the others of the batch."""
        return self.objective.coupled or any(map(self.uses, self.objective.coupled_by))

    def uses(self, option: str) -> bool:
        """Whether an option is given, if it is None by default, and not 0 or False otherwise."""
        value, default = self.options[option], self.objective.options[option][1]
        return value is not None if default is None else bool(value)


def make_term(name: str, weight: float = 1.0, **options: Any) -> Term:
    """An objective by its name, with its defaults where no option is given.

    Raises:
      TypeError: there is no such option, or one without a default is not given.
    """
    objective = OBJECTIVES[name]
    defaults = {key: default for key, (_, default) in objective.options.items()}
    missing = [key for key, default in defaults.items() if default is ... and key not in options]
    if missing:
        raise TypeError(f"objective {name} needs the option {missing[0]!r}")
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"objective {name} has no option {min(unknown)!r}")
    return Term(objective, weight, {**defaults, **options})


def needs(terms: Sequence[Term]) -> frozenset[str]:
    """What any of the terms needs."""
    return frozenset().union(*(term.needs for term in terms))


def reads_log_probs(terms: Sequence[Term]) -> bool:
    """Whether any of the terms reads log-probs of tokens, and not a model's rewards alone."""
    return any(term.objective.kind != "rewards" for term in terms)


def rows_read(terms: Sequence[Term]) -> Rows:
    """What all of the terms read; another image is one for all of them, and so are critiques and a
    teacher's divergence."""
    rows = [term.rows for term in terms]
    changing = next((each for each in rows if each.other_image is not None), Rows())
    scored = [each.scored for each in rows if each.scored is not None]
    critiques = [each for each in scored if each.critique_prompt is not None]
    divergences = [each.divergence for each in rows if each.divergence is not None]
    return dataclasses.replace(
        changing,
        joint=any(each.joint for each in rows),
        mismatched=any(each.mismatched for each in rows),
        scored=next(iter([*critiques, *scored]), None),
        divergence=next(iter(divergences), None),
    )


def coupled(terms: Sequence[Term]) -> bool:
    """Whether the loss of a row depends on the others of the batch."""
    return any(term.coupled for term in terms)


def first_state(terms: Sequence[Term]) -> State:
    """What the terms keep from step to step, at the start: `number of the term/name`."""
    return {
        f"{index}/{name}": jnp.float32(value)
        for index, term in enumerate(terms)
        for name, value in term.objective.state.items()
    }


def loss_sums(
    terms: Sequence[Term], responses: Responses, weights: Float[Array, " N"], state: State
) -> tuple[list[Sums], State]:
    """Every term's sums.

    Args:
      terms: T of them.
      responses: [N, S].
      weights: float32[N], 0 for rows that only fill the batch.
      state: of all terms, as `first_state` names it.

    Returns:
      (sums of every term, the state after this batch). Weights of the sums depend on the data
      only, never on log-probs.
    """
    sums: list[Sums] = []
    new_state: State = {}
    for index, term in enumerate(terms):
        prefix = f"{index}/"
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        made, own = term.objective.apply(responses, weights, own, term.options)
        sums.append(made)
        new_state |= {prefix + name: jax.lax.stop_gradient(value) for name, value in own.items()}
    return sums, new_state


def weighted_loss(terms: Sequence[Term], sums: Sequence[Sums]) -> Float[Array, ""]:
    """The loss: the terms' means, weighted and added up."""
    parts = [
        term.weight * jnp.sum(mean(part.loss, part.weight))
        for term, part in zip(terms, sums, strict=True)
    ]
    return jnp.sum(jnp.stack(parts))


def metrics_of(terms: Sequence[Term], sums: Sequence[Sums]) -> Metrics:
    """Metrics by TRL's names, the first term's where several have one; of several terms also the
    loss of each as `loss/name`, and `loss/name_2` of the second of a name."""
    metrics: Metrics = {}
    seen: Counter[str] = Counter()
    for term, part in zip(terms, sums, strict=True):
        values: Metrics = dict(part.metrics)
        if len(terms) > 1:
            name = term.objective.name
            seen[name] += 1
            number = f"_{seen[name]}" if seen[name] > 1 else ""
            values[f"loss/{name}{number}"] = jnp.sum(mean(part.loss, part.weight))
        metrics = values | metrics
    return metrics
