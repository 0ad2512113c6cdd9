"""Log-probs of responses under a model: the function every method here is built on.

And what else is read of every token's distribution, from the same logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.models.head import Taught, token_statistics
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.vlm import States, VisionLanguageModel

REWARDS = "rewards"
"""Name of what the reward head says of every response."""
LOADS = "expert_loads"
"""Name of how tokens spread over experts, see `VisionLanguageModel.states_and_loads`."""


class Teacher(NamedTuple):
    """A model whose distributions are compared with; never has a gradient."""

    model: Model
    params: Params
    batch: Batch
    """The responses of the policy's batch, in the same places, after the teacher's own prompts."""
    beta: float
    """How they are compared, see `divergence.token_divergence`."""
    top_k: int | None


def response_log_probs(
    model: Model,
    params: Params,
    batch: Batch | PackedBatch,
    *,
    remat: str = "none",
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Float[Array, "B R T"]:
    """Log-prob of every response token, images encoded and prompts decoded once.

    Equal to running each response in a row of its own. The head is applied at response positions
    only and `chunk` of them at a time, so logits [B, R, T, V] never exist, backward included.

    Args:
      model: the architecture.
      params: its parameters; their dtype is the compute dtype.
      batch: B prompts with R responses each.
      remat: rematerialisation policy of the layers, see `layers.rematerialise`.
      chunk: response positions per application of the head; None picks it by `HEAD_BYTES`.
      temperature: logits are divided by it.

    Returns:
      float32[B, R, T] (float64 for float64 parameters), 0 at padding. Of a packed batch
      [Z * C, R, T], 0 also at tokens that no loss counts.
    """
    found = response_statistics(
        model, params, batch, remat=remat, chunk=chunk, temperature=temperature
    )
    return found["log_probs"]


def response_statistics(
    model: Model,
    params: Params,
    batch: Batch | PackedBatch,
    names: Collection[str] = (),
    *,
    reference: Params | None = None,
    remat: str = "none",
    chunk: int | None = None,
    partners: Sequence[int] = (0,),
    temperature: float = 1.0,
    rewards: bool = False,
    loads: bool = False,
    teacher: Teacher | None = None,
) -> dict[str, Float[Array, "B R ..."]]:
    """`response_log_probs` and other numbers of every response token, from the same logits.

    Args:
      model, params, batch, remat, chunk, temperature: see `response_log_probs`.
      names: of the statistics, see `token_statistics`; `kl` needs a reference, `divergence` a
        teacher.
      reference: parameters of a second model of the same architecture; never has a gradient.
      partners: see `token_statistics`.
      rewards: whether `REWARDS` are wanted too, from the same hidden states.
      loads: whether `LOADS` are.
      teacher: of the statistic `divergence`; its vocabulary is the policy's, which either may have
        filled up with ids that mean nothing.

    Returns:
      name -> float32[B, R, T], 0 at padding: `log_probs`, those asked for, and where there is a
      reference `reference_log_probs` and what else is asked for of it; of a packed batch see
      `response_log_probs`. `REWARDS` is [B, R], see `response_rewards`, and `LOADS` [B, 2, E] of
      every row that the decoder reads.
    """
    packed = isinstance(batch, PackedBatch)
    assert not packed or len(partners) == 1, "a record's contexts do not stand in packed rows"

    decoder = model.config.decoder
    vocab_size, softcap = decoder.vocab_size, decoder.softcap
    other = None if reference is None else _fixed_head(model, reference, batch)
    taught = None
    if teacher is not None:
        head = _fixed_head(teacher.model, teacher.params, teacher.batch)
        theirs = teacher.model.config.decoder
        taught = Taught(*head, theirs.vocab_size, theirs.softcap, teacher.beta, teacher.top_k)
    module = model.bind(params)
    spread = {}
    if loads:
        states, spread[LOADS] = module.states_and_loads(batch, remat)
    else:
        states = module.states(batch, remat)
    hidden, kernel = predicting_states(states, batch), module.language_model.head_kernel()
    labels = batch.target[:, None] if isinstance(batch, PackedBatch) else batch.response_ids
    found = token_statistics(
        hidden,
        kernel,
        labels,
        names,
        other,
        chunk,
        partners,
        temperature,
        vocab_size,
        softcap,
        taught,
    )
    if isinstance(batch, PackedBatch):
        found = {name: unpack(values[:, 0], batch) for name, values in found.items()}
    else:
        found = {name: values * batch.response_mask for name, values in found.items()}
    found |= {REWARDS: rewards_at_ends(module, states, batch)} if rewards else {}
    return found | spread


def _fixed_head(
    model: Model, params: Params, batch: Batch | PackedBatch
) -> tuple[Float[Array, "B R T D"], Float[Array, "D V"]]:
    """(states that predict the responses, head) of a model that is not trained."""
    module = model.bind(jax.lax.stop_gradient(params))
    hidden = predicting_states(module.states(batch), batch)
    return jax.lax.stop_gradient((hidden, module.language_model.head_kernel()))


def response_rewards(
    model: Model, params: Params, batch: Batch | PackedBatch, *, remat: str = "none"
) -> Float[Array, "B R"]:
    """What the reward head says at the end of every response, float32[B, R] (float64 for float64
    parameters); of a packed batch [Z * C, R]. 0 where there is no response.

    The language-model head, of which not every reward model has one, is not applied.

    Args:
      model: the architecture, with a reward head.
      params, batch, remat: see `response_log_probs`.
    """
    module = model.bind(params)
    return rewards_at_ends(module, module.states(batch, remat), batch)


def rewards_at_ends(
    module: VisionLanguageModel, states: States, batch: Batch | PackedBatch
) -> Float[Array, "B R"]:
    """`response_rewards` of the states of a batch."""
    return module.rewards(states_at_ends(states, batch)) * batch.loss_mask.any(axis=-1)


def states_at_ends(states: States, batch: Batch | PackedBatch) -> Float[Array, "B R D"]:
    """Hidden states of the last token of every response, [B, R, D] or [Z * C, R, D].

    A response without tokens, one that is wholly part of the shared prompt, ends where that does.
    """
    if isinstance(batch, PackedBatch):
        assert not isinstance(states, tuple)
        last = batch.last.reshape(len(states), -1)
        return rows_at(states, last).reshape(*batch.last.shape, -1)
    of_prompt, responses = states
    lengths = batch.response_mask.sum(axis=-1)
    at_end = jax.vmap(jax.vmap(lambda rows, at: rows[at]))(responses, jnp.maximum(lengths - 1, 0))
    return jnp.where((lengths == 0)[..., None], of_prompt[:, None], at_end)


def predicting_states(states: States, batch: Batch | PackedBatch) -> Float[Array, "B R T D"]:
    """Hidden states that predict each response token, [B, R, T, D]; of a packed batch those of its
    targets, [Z, 1, M, D]."""
    if isinstance(batch, PackedBatch):
        assert not isinstance(states, tuple)
        return rows_at(states, batch.predictor)[:, None]
    return shift_right(*states)


def rows_at(rows: Float[Array, "Z X D"], at: Int[Array, "Z M"]) -> Float[Array, "Z M D"]:
    """rows [Z, X, D] at places int32[Z, M] of X: [Z, M, D]."""
    return jax.vmap(lambda x, places: x[places])(rows, at)


def unpack(values: Float[Array, "Z M"], batch: PackedBatch) -> Float[Array, "ZC R T"]:
    """Numbers of tokens [Z, M] in their places of [Z * C, R, T]; 0 elsewhere."""
    groups, shape = len(values), batch.loss_mask.shape
    empty = jnp.zeros((groups, batch.loss_mask.size // groups), values.dtype)
    filled = jax.vmap(lambda x, at, value: x.at[at].set(value, mode="drop"))(
        empty, batch.target_place, values
    )
    return filled.reshape(shape)


def shift_right(
    last: Float[Array, "B D"], responses: Float[Array, "B R T D"]
) -> Float[Array, "B R T D"]:
    """Hidden states that predict each response token, [B, R, T, D].

    The first token of every response is predicted from the prompt's last position `last` [B, D],
    the others from the token before them.
    """
    b, r, _, d = responses.shape
    first = jnp.broadcast_to(last[:, None, None, :], (b, r, 1, d))
    return jnp.concatenate([first, responses[:, :, :-1]], axis=2)


def sum_log_probs(
    log_probs: Float[Array, "B R T"], batch: Batch | PackedBatch
) -> Float[Array, "B R"]:
    """float32[B, R]: log-prob of every response, over the tokens its loss counts."""
    return (log_probs * batch.loss_mask).sum(axis=-1)
