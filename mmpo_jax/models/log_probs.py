"""Log-probs of responses under a model: the function every method here is built on.

And what else some objectives read of every token's distribution, from the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mmpo_jax.models.attention import capped
from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.models.layers import batch_axes, spread_gradient
from mmpo_jax.models.linear import matmul
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.vlm import States, VisionLanguageModel
from mmpo_jax.objectives.distillation import token_divergence
from mmpo_jax.objectives.registry import Divergence

REWARDS = "rewards"
"""Name of what the reward head says of every response."""
LOADS = "expert_loads"
"""Name of how tokens spread over experts, see `VisionLanguageModel.states_and_loads`."""

HEAD_BYTES = 64 * 2**20
"""How much one chunk of the head may hold per device: logits, and what it gathers for them."""


class Teacher(NamedTuple):
    """A model whose distributions are compared with; never has a gradient."""

    model: Model
    params: Params
    batch: Batch
    """The responses of the policy's batch, in the same places, after the teacher's own prompts."""
    divergence: Divergence
    """How they are compared."""


class Taught(NamedTuple):
    """What a teacher says at the places of the responses, and how it is compared."""

    hidden: Float[Array, "B R T E"]
    """States of the teacher, of its own width E, that predict each response token."""
    kernel: Float[Array, "E W"]
    """The teacher's head."""
    vocab_size: int
    """Tokens that there are of W."""
    softcap: float | None
    """What its logits are kept below, see `attention.capped`."""
    divergence: Divergence
    """How they are compared."""


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
        taught = Taught(*head, theirs.vocab_size, theirs.softcap, teacher.divergence)
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


def token_log_probs(
    hidden: Float[Array, "B R T D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "B R T"],
    chunk: int | None = None,
) -> Float[Array, "B R T"]:
    """log softmax(hidden @ kernel)[labels], float32[B, R, T]; see `token_statistics`."""
    return token_statistics(hidden, kernel, labels, chunk=chunk)["log_probs"]


def token_statistics(
    hidden: Float[Array, "B R T D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "B R T"],
    names: Collection[str] = (),
    reference: tuple[Float[Array, "B R T D"], Float[Array, "D V"]] | None = None,
    chunk: int | None = None,
    partners: Sequence[int] = (0,),
    temperature: float = 1.0,
    vocab_size: int | None = None,
    softcap: float | None = None,
    teacher: Taught | None = None,
) -> dict[str, Float[Array, "B R T"]]:
    """log softmax(hidden @ kernel / temperature)[labels], and more, without storing the logits.

    On a mesh every device computes the logits of its own part of the vocabulary, for the rows of
    all devices that share the axis `fsdp`: what travels is hidden states. With rows of its own it
    would hold the whole head and the head's whole gradient, gigabytes, and exchange both with
    every chunk.

    Args:
      hidden: [B, R, T, D].
      kernel: [D, V].
      labels: int32[B, R, T].
      names: what else is wanted: `collision` log sum_v p_v^2, `logit` the label's logit, `kl`
        KL(reference || this) over the vocabulary, `own` the log-prob of the token that is most
        probable in the row's partner, `entropy` that of the distribution, `divergence` that of the
        teacher's from it.
      reference: hidden states and head of a reference.
      chunk: positions of T per step; the backward pass recomputes each step's logits.
      partners: rows come in groups of C; for each of a group, the place of its partner in it.
      temperature: all logits are divided by it, the reference's too.
      vocab_size: tokens that there are; the kernel may have more, see `vocabulary`. None for V.
      softcap: what logits are kept below, see `attention.capped`.
      teacher: what a teacher says, for `divergence`.

    Returns:
      name -> float32[B, R, T]: `log_probs`, `names`, and if there is a reference
      `reference_log_probs`, and `reference_logit` and `reference_own` beside `logit` and `own`.
    """
    b, r, t, _ = hidden.shape
    heads = [(hidden, split_vocabulary(kernel))]
    if reference is not None:
        heads.append((reference[0], split_vocabulary(reference[1])))
    taught = [] if teacher is None else [(teacher.hidden, split_vocabulary(teacher.kernel))]
    chunk = chunk or head_chunk(b * r * len(heads + taught), t, *kernel.shape)
    steps = -(-t // chunk)
    pad = steps * chunk - t

    mesh = jax.sharding.get_abstract_mesh()
    by_rows = PartitionSpec() if mesh.empty else PartitionSpec(batch_axes(mesh))

    def partner(x: jax.Array) -> jax.Array:
        groups = x.reshape(-1, len(partners), *x.shape[1:])
        return groups[:, jnp.array(partners)].reshape(x.shape)

    def score(_, inputs):
        targets, *states = inputs
        states = [spread_gradient(x, by_rows) for x in states]
        states, of_teacher = states[: len(heads)], states[len(heads) :]
        logits, normaliser, chosen = [], [], []
        for x, (_, kernel) in zip(states, heads, strict=True):
            made = split_vocabulary(project(x, kernel, vocab_size, softcap))
            logits.append(made / temperature)
            normaliser.append(jax.nn.logsumexp(logits[-1], axis=-1, keepdims=True))
            chosen.append(jnp.take_along_axis(logits[-1], targets[..., None], axis=-1))
        log_probs = [value - norm for value, norm in zip(chosen, normaliser, strict=True)]
        found = dict(zip(("log_probs", "reference_log_probs"), log_probs, strict=False))
        if "logit" in names:
            found |= dict(zip(("logit", "reference_logit"), chosen, strict=False))
        if "own" in names:
            best = [partner(jnp.argmax(x, axis=-1))[..., None] for x in logits]
            own = [
                jnp.take_along_axis(x, token, axis=-1) - norm
                for x, token, norm in zip(logits, best, normaliser, strict=True)
            ]
            found |= dict(zip(("own", "reference_own"), own, strict=False))
        if "collision" in names:
            twice = 2 * (logits[0] - normaliser[0])
            found["collision"] = jax.nn.logsumexp(twice, axis=-1, keepdims=True)
        if "kl" in names:
            ours, theirs = (x - norm for x, norm in zip(logits, normaliser, strict=True))
            found["kl"] = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1, keepdims=True)
        if "entropy" in names:
            ours = logits[0] - normaliser[0]
            found["entropy"] = -jnp.sum(jnp.exp(ours) * ours, axis=-1, keepdims=True)
        if teacher is not None:
            _, kernel = taught[0]
            theirs = project(of_teacher[0], kernel, teacher.vocab_size, teacher.softcap)
            shared = min(theirs.shape[-1], logits[0].shape[-1])
            ours, theirs = (
                jax.nn.log_softmax(split_vocabulary(x[..., :shared]), axis=-1)
                for x in (logits[0], theirs / temperature)
            )
            found["divergence"] = token_divergence(ours, theirs, teacher.divergence)[..., None]
        return None, {name: values[..., 0] for name, values in found.items()}

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pad), *[(0, 0)] * (x.ndim - 3)))
        return jnp.moveaxis(x.reshape(b, r, steps, chunk, *x.shape[3:]), 2, 0)

    inputs = (split(labels), *(split(x) for x, _ in heads + taught))
    _, found = jax.lax.scan(jax.checkpoint(score, prevent_cse=False), None, inputs)
    return {
        name: jnp.moveaxis(x, 0, 2).reshape(b, r, steps * chunk)[:, :, :t]
        for name, x in found.items()
    }


def split_vocabulary(x: Float[Array, "*d V"]) -> Float[Array, "*d V"]:
    """Spreads the last axis of the head [D, V] or of logits [B, R, t, V] over the mesh, if one is
    in use; rows stay where their axis `data` puts them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    rows = "data" if x.ndim > 2 and "data" in mesh.axis_names else None
    over = tuple(axis for axis in mesh.axis_names if axis != "data")
    spec = PartitionSpec(rows, *[None] * (x.ndim - 2), over)
    return jax.lax.with_sharding_constraint(x, spec)


def head_chunk(rows: int, length: int, size: int, vocab_size: int) -> int:
    """Response positions per application of the head: as few, equal steps as the budget allows.

    Args:
      rows: B * R.
      length: T.
      size: D; where the vocabulary is split, hidden states of other devices' rows count too.
      vocab_size: V.
    """
    numbers = vocab_size
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        data = mesh.shape.get("data", 1)
        rows, split = math.ceil(rows / data), mesh.size // data
        numbers = math.ceil(vocab_size / split) + (size if split > 1 else 0)
    steps = -(-length * rows * numbers * 4 // HEAD_BYTES)
    return max(1, -(-length // max(1, steps)))


def next_token_logits(
    module: VisionLanguageModel, hidden: Float[Array, "*b D"]
) -> Float[Array, "*b V"]:
    """[..., D] -> float32 logits [..., V]; for a few positions only."""
    decoder = module.config.decoder
    kernel = module.language_model.head_kernel()
    return project(hidden, kernel, decoder.vocab_size, decoder.softcap)


def project(
    hidden: Float[Array, "*b D"],
    kernel: Float[Array, "D W"],
    vocab_size: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "*b V"]:
    """hidden [..., D] @ kernel [D, W] in float32 at least: bfloat16 logits are 0.06 off at 20.

    Of a kernel that was filled up the first V = `vocab_size` columns are tokens. With a softcap,
    logits are kept below it, see `attention.capped`.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return capped(matmul(hidden, kernel, dtype)[..., :vocab_size], softcap)


def sum_log_probs(
    log_probs: Float[Array, "B R T"], batch: Batch | PackedBatch
) -> Float[Array, "B R"]:
    """float32[B, R]: log-prob of every response, over the tokens its loss counts."""
    return (log_probs * batch.loss_mask).sum(axis=-1)
