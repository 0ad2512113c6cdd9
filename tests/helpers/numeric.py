"""What the tests of objectives share: random responses, their loss, and finite differences."""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import mean
from mmpo_jax.objectives.terms import make_term


def random_responses(n, s, t=5, seed=0, reference=True, **fields):
    """Responses of 1 to t tokens in float64 (under `jax.enable_x64`)."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, t + 1, (n, s))
    mask = np.arange(t) < length[..., None]
    log_probs = np.where(mask, -2 * rng.random((n, s, t)), 0)
    of_reference = np.where(mask, -2 * rng.random((n, s, t)), 0)
    return Responses(
        log_probs,
        mask,
        of_reference.sum(-1) if reference else None,
        of_reference if reference else None,
        fields={name: np.asarray(value, np.float64) for name, value in fields.items()},
    )


def loss_of(name, responses, weights=None, state=None, **options):
    """(loss, metrics, state) of an objective by its name; float64 where the responses are."""
    term = make_term(name, **options)
    weights = np.ones(responses.mask.shape[0]) if weights is None else np.asarray(weights)
    state = dict(term.objective.state) if state is None else state
    return evaluate(responses, weights, state, _Term(name, tuple(sorted(options.items()))))[0]


def gradient_of(name, responses, **options):
    """By the log-prob of every token."""
    term = make_term(name, **options)
    weights, state = np.ones(responses.mask.shape[0]), dict(term.objective.state)
    _, slope = evaluate(responses, weights, state, _Term(name, tuple(sorted(options.items()))))
    return np.asarray(slope)


@dataclasses.dataclass(frozen=True)
class _Term:
    """What is compiled once."""

    name: str
    options: tuple


@functools.partial(jax.jit, static_argnames="made")
def evaluate(responses, weights, state, made):
    term = make_term(made.name, **dict(made.options))

    def value(log_probs):
        changed = dataclasses.replace(responses, log_probs=log_probs)
        sums, kept = term.objective.apply(changed, weights, state, term.options)
        loss = mean(sums.loss, sums.weight).sum()
        metrics = {key: mean(*pair) for key, pair in sums.metrics.items()}
        return loss, (loss, metrics, kept)

    slope, result = jax.grad(value, has_aux=True)(responses.log_probs)
    return result, slope


def slopes(function, point, step=1e-6):
    """Central differences of a function of an array, one element at a time."""
    found = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        moved = [point.copy(), point.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        found[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return found


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def check_extremes(name, make, **options):
    """Loss and gradients are finite in float32 wherever log-probs lie: all at one end, or those of
    every other response at the opposite one, either way."""
    responses = make()
    for policy, reference in itertools.product(POLICIES, REFERENCES):
        changed = dataclasses.replace(
            _at_ends(responses, policy, reference),
            views={
                key: _at_ends(view, policy[1:] * 2, reference[1:] * 2)
                for key, view in responses.views.items()
            },
        )
        assert np.isfinite(loss_of(name, changed, **options)[0])
        assert np.isfinite(gradient_of(name, changed, **options)).all()


POLICIES = [(-1000, -1000), (-1e-3, -1e-3), (0, 0), (-1000, 0), (0, -1000)]
REFERENCES = [(-1000, -1000), (0, 0), (1000, 1000), (-1000, 1000), (1000, -1000)]
"""Log-probs by turns: of every token; under the reference also of the whole response."""


def _at_ends(responses, policy, reference):
    turn = np.indices(responses.mask.shape[:2]).sum(axis=0) % 2
    policy, reference = (np.float32(ends)[turn] for ends in (policy, reference))
    changed = dataclasses.replace(responses, log_probs=policy[..., None] * responses.mask)
    if responses.reference is None:
        return changed
    per_token = reference[..., None] * responses.mask
    return dataclasses.replace(changed, reference=reference, reference_log_probs=per_token)
