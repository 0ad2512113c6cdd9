"""Random responses with all that an objective may ask for, and losses of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.registry import FIELDS, STATISTICS
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import mean
from mmpo_jax.objectives.terms import Term, first_state, make_term

DIMENSIONS = {"safe": 0.2, "short": 0.3}
REQUIRED: dict[str, dict[str, Any]] = {"modpo": {"dimensions": DIMENSIONS}}
"""Options that have no default."""

COMPILED: dict[str, Any] = {}
"""By objective and options."""

PAIRWISE = sorted(name for name, found in OBJECTIVES.items() if found.kind == "pairs")


def term_of(name: str, **options: Any) -> Term:
    return make_term(name, **(REQUIRED.get(name, {}) | options))


def ranked(ranks: Any, seed: int = 0, size: int = 6, lengths: Any = None) -> Responses:
    """Responses [N, S] in float64 with these ranks; 0 is no response.

    Args:
      ranks: [N, S].
      seed: of everything drawn.
      size: T.
      lengths: [N, S], drawn where not given.
    """
    rng = np.random.default_rng(seed)
    rank = np.array(ranks, np.float64)
    n, s = rank.shape
    if lengths is None:
        lengths = rng.integers(1, size + 1, (n, s))
    mask = (np.arange(size) < np.array(lengths)[..., None]) & (rank > 0)[..., None]

    def tokens() -> np.ndarray:
        return (-np.abs(1 + rng.standard_normal((n, s, size)))) * mask

    log_probs = tokens()
    reference = (log_probs + 0.6 * rng.standard_normal((n, s, size))) * mask
    score = rng.standard_normal((n, s)) + 3 - rank
    best = np.where(rank > 0, rank, np.inf).min(axis=1, keepdims=True)
    fields = {
        "rank": rank,
        "score": score,
        "win_rate": rng.random((n, s)),
        "consistency": np.broadcast_to(rng.random((n, 1)), (n, s)),
        "gold": np.arange(s) == (rank == best).argmax(axis=1)[:, None],
        "desirable": rank == best,
    }
    fields |= {f"scores/{name}": rng.standard_normal((n, s)) for name in DIMENSIONS}
    # Whatever else is said of the tokens.
    spans = {name: rng.integers(0, 2, (n, s, size)) for name in sorted(FIELDS.keys() - fields)}
    fields |= spans
    statistics = {
        prefix + name: np.abs(tokens()) if name == "kl" else tokens()
        for name in sorted(STATISTICS)
        for prefix in ("", "reference_")
    }

    def view(**changes: Any) -> Responses:
        return Responses(
            log_probs=jnp.asarray(log_probs),
            mask=jnp.asarray(mask),
            reference=jnp.asarray(reference.sum(-1)),
            reference_log_probs=jnp.asarray(reference),
            statistics=jax.tree.map(jnp.asarray, statistics),
            fields={key: jnp.asarray(value, jnp.float64) for key, value in fields.items()},
            **changes,
        )

    other = dataclasses.replace(view(), log_probs=jnp.asarray(tokens()))
    return view(views={"other_image": other})


def loss_of(term: Term, responses: Responses, weights: Any = None) -> jax.Array:
    """The loss of the batch."""
    if weights is None:
        weights = np.ones(responses.mask.shape[0])
    state = {key.partition("/")[2]: value for key, value in first_state([term]).items()}
    sums, _ = term.objective.apply(responses, jnp.asarray(weights), state, term.options)
    return mean(sums.loss, sums.weight)


def value_and_gradient(
    term: Term, responses: Responses, weights: Any = None
) -> tuple[float, np.ndarray]:
    """(loss, its gradient [N, S, T] by the policy's log-probs)."""
    key = repr((term.objective.name, term.options))
    if key not in COMPILED:

        def of(log_probs: jax.Array, responses: Responses, weights: jax.Array) -> jax.Array:
            return loss_of(term, dataclasses.replace(responses, log_probs=log_probs), weights)

        COMPILED[key] = jax.jit(jax.value_and_grad(of))
    if weights is None:
        weights = np.ones(responses.mask.shape[0])
    value, gradient = COMPILED[key](responses.log_probs, responses, np.array(weights))
    return float(value), np.asarray(gradient)
