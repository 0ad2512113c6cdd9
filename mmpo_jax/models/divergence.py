"""How far two distributions over the vocabulary are from each other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmpo_jax.models.vocabulary import split_vocabulary, vocabulary_parts, vocabulary_spec


def token_divergence(
    student: Float[Array, "*b V"],
    teacher: Float[Array, "*b V"],
    beta: float,
    top_k: int | None = None,
) -> Float[Array, "*b"]:
    """The generalized Jensen-Shannon divergence of two distributions from their log-probs.

    Agarwal et al. 2024 (arXiv 2306.13649), eq. 1: b KL(teacher || m) + (1 - b) KL(student || m),
    m = b teacher + (1 - b) student. 0 and 1 stand for KL(teacher || student) and KL(student ||
    teacher), what it goes to there when it is divided by b and by 1 - b. With `top_k` it is that of
    coarser distributions, in which all tokens but the teacher's k most probable ones are one: never
    more, and 0 where the full one is.

    Args:
      student, teacher: log-probs over V tokens, which devices may share.
      beta: b.
      top_k: tokens that are told apart; None for all.
    """
    each = _divergence_of_token(student, teacher, beta)
    if top_k is None or top_k >= student.shape[-1]:
        return each.sum(axis=-1)
    # By places and not by values, of which the compiler may round a second copy differently.
    rest = ~most_probable(teacher, top_k)
    tails = [_log_sum(jnp.where(rest, x, -jnp.inf)) for x in (student, teacher)]
    of_rest = jnp.where(rest.any(axis=-1), _divergence_of_token(tails[0], tails[1], beta), 0)
    return jnp.where(rest, 0, each).sum(axis=-1) + of_rest


def _log_sum(values: Float[Array, "*b V"]) -> Float[Array, "*b"]:
    """Log of the sum of probabilities; of nothing a number without a gradient."""
    nothing = jnp.isneginf(values).all(axis=-1, keepdims=True)
    return jax.nn.logsumexp(jnp.where(nothing, 0.0, values), axis=-1)


def _divergence_of_token(
    student: Float[Array, "*b"], teacher: Float[Array, "*b"], beta: float
) -> Float[Array, "*b"]:
    """What one token adds to the divergence."""
    if beta == 0:
        return jnp.exp(teacher) * (teacher - student)
    if beta == 1:
        return jnp.exp(student) * (student - teacher)
    mixture = jnp.logaddexp(student + jnp.log1p(-beta), teacher + jnp.log(beta))
    of_teacher = jnp.exp(teacher) * (teacher - mixture)
    return beta * of_teacher + (1 - beta) * jnp.exp(student) * (student - mixture)


def most_probable(values: Float[Array, "*b V"], count: int) -> Bool[Array, "*b V"]:
    """Whether a number is among so many largest ones; of equal ones the first are.

    On a mesh `jax.lax.top_k` would make the numbers of all rows whole on every device. So each
    looks among its own part of them, and what it found there is sent alone.
    """
    values = jax.lax.stop_gradient(values)
    if jax.sharding.get_abstract_mesh().empty:
        return _among(values, jax.lax.top_k(values, count)[1], True)
    added = -values.shape[-1] % vocabulary_parts()
    widths = [*[(0, 0)] * (values.ndim - 1), (0, added)]
    padded = split_vocabulary(jnp.pad(values, widths, constant_values=-jnp.inf))
    spec = vocabulary_spec(padded)
    of_part = functools.partial(_most_probable_of_part, count=count, axes=spec[-1])
    found = jax.shard_map(of_part, in_specs=spec, out_specs=spec, check_vma=False)(padded)
    return found[..., : values.shape[-1]]


def _most_probable_of_part(
    values: Float[Array, "*b W"], *, count: int, axes: tuple[str, ...]
) -> Bool[Array, "*b W"]:
    """`most_probable` of one device's part of the numbers."""
    own = min(count, values.shape[-1])  # no part has more than all of its own
    found, places = jax.lax.top_k(values, own)
    of_all = jax.lax.all_gather(found, axes, axis=found.ndim - 1, tiled=True)
    chosen = jax.lax.top_k(of_all, count)[1]
    chosen = _among(of_all, chosen, True)
    chosen = jax.lax.dynamic_slice_in_dim(
        chosen, own * jax.lax.axis_index(axes), own, axis=chosen.ndim - 1
    )
    return _among(values, places, chosen)


def _among(
    values: Float[Array, "*b V"], places: Int[Array, "*b K"], chosen: Bool[Array, "*b K"] | bool
) -> Bool[Array, "*b V"]:
    """What is `chosen` at its places, False elsewhere."""
    nothing = jnp.zeros(values.shape, bool)
    return jnp.put_along_axis(nothing, places, chosen, axis=-1, inplace=False)
