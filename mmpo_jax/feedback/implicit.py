"""DPO's own reward: how much more probable a response is under the policy than under its reference.

    r(y | x) = beta * sum over t of log(policy(y_t | ...) / reference(y_t | ...))

It is what DPO trains, up to a term of the prompt alone (Rafailov et al. 2023, arXiv 2305.18290,
equation 5), so rewards of responses to one prompt compare, and no others. Divided by the number of
tokens it guides the policy itself at inference (RLAIF-V, arXiv 2405.17220, which found that the sum
prefers short responses).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mmpo_jax.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record
from mmpo_jax.data.same_tokens import check_same_tokenizer
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import Tokenize, TokenizedRecord, tokenize
from mmpo_jax.data.usable import unsupported
from mmpo_jax.scoring.log_probs import score_records, score_stage

log = logging.getLogger(__name__)

REFERENCE = "reference"
"""Name of the context that holds a record's responses behind the prompt of the reference."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImplicitRewards:
    """Rewards of the R responses to one prompt."""

    summed: Float[np.ndarray, " R"]
    """float64; beta times the log-ratio of the whole response."""
    num_tokens: Int[np.ndarray, " R"]
    """The assistant's tokens, EOS included."""

    @property
    def per_token(self) -> Float[np.ndarray, " R"]:
        """float64; `summed` divided by the number of tokens."""
        return self.summed / self.num_tokens


def open_both(
    policy: str, reference: str, attention: str, template: str
) -> tuple[Checkpoint, Checkpoint]:
    """Policy and reference before their weights are read.

    Args:
      policy, reference: names of checkpoints.
      attention: of both, see `attention.BACKENDS`.
      template: of the dialogues, for both.

    Raises:
      MmpoError: one of them is not there, or the two cannot be compared.
    """
    opened = [open_checkpoint(name, attention, template) for name in (policy, reference)]
    check_same_tokenizer(*(one.processor for one in opened))
    if opened[0].fingerprint == opened[1].fingerprint:
        log.warning("policy and reference are the same checkpoint: every reward is 0")
    ours, theirs = (one.processor.fingerprints()["template"] for one in opened)
    if ours != theirs:
        log.warning(
            "%s and %s have other chat templates, so they see prompts rendered differently; "
            "`template` gives both one",
            *(one.processor.folder for one in opened),
        )
    return opened[0], opened[1]


def reward_stage(
    policy: Checkpoint,
    reference: Checkpoint,
    records: Sequence[TokenizedRecord],
    lengths: Lengths | None,
    mesh: Mesh,
    *,
    beta: float,
    **options: Any,
) -> list[ImplicitRewards]:
    """`reward_records` part by part, as the stages `policy` and `reference` of a folder.

    One model is on the devices at a time: the policy is released when it is scored, and the
    reference is read then.

    Args:
      policy: its parameters are released.
      reference: as `open_checkpoint` gives it.
      records: of `tokenizer_for_both`.
      lengths: bucket sizes; None for those that the records need.
      mesh: the devices.
      beta: factor of the rewards.
      **options: folder, batch_size and compute_dtype of `score_stage`.

    Raises:
      MmpoError: the two cannot be compared, see `check_same_tokenizer`.
      DataError: naming rows whose log-probs are not finite; parts finished before are kept.
    """
    check_same_tokenizer(policy.processor, reference.processor)
    ours, theirs = of_policy(records), of_reference(records)
    fitting = lengths or fitting_lengths(ours), lengths or fitting_lengths(theirs)
    table = score_stage(policy, ours, fitting[0], mesh, name="policy", **options)
    policy.release()
    reference = reference.reloaded(mesh)
    other = score_stage(reference, theirs, fitting[1], mesh, name=REFERENCE, **options)
    sums = [scores["log_probs"].to_pylist() for scores in (table, other)]
    return _rewards(records, sums[0], sums[1], beta)


def reward_records(
    policy: Checkpoint,
    reference: Checkpoint,
    records: Sequence[TokenizedRecord],
    mesh: Mesh,
    *,
    beta: float,
    batch_size: int,
    compute_dtype: str,
) -> list[ImplicitRewards]:
    """Rewards of every response of every record, in order.

    Args:
      policy, reference: with their parameters on the mesh.
      records: of `tokenizer_for_both`.
      mesh: the devices.
      beta: factor of the rewards.
      batch_size: records at a time, over all devices.
      compute_dtype: of both models' passes.

    Raises:
      MmpoError: the two cannot be compared, see `check_same_tokenizer`.
    """
    check_same_tokenizer(policy.processor, reference.processor)
    pairs = (policy, of_policy(records)), (reference, of_reference(records))
    sums = [
        score_records(checkpoint, rows, fitting_lengths(rows), mesh, batch_size, compute_dtype)
        for checkpoint, rows in pairs
    ]
    return _rewards(records, sums[0], sums[1], beta)


def _rewards(
    records: Sequence[TokenizedRecord],
    policy: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]],
    beta: float,
) -> list[ImplicitRewards]:
    """The rewards of log-probs; equal responses have the first one's, as those that stand in other
    places of a batch may be rounded otherwise."""
    rewards = []
    for record, ours, theirs in zip(records, policy, reference, strict=True):
        first: dict[tuple[bytes, bytes], int] = {}
        places = [
            first.setdefault((response.ids.tobytes(), response.loss_mask.tobytes()), place)
            for place, response in enumerate(record.responses)
        ]
        summed = beta * (np.array(ours, np.float64) - np.array(theirs, np.float64))
        counts = [int(response.loss_mask.sum()) for response in record.responses]
        rewards.append(ImplicitRewards(summed[places], np.array(counts, np.int32)))
    return rewards


def tokenizer_for_both(reference: Processor) -> Tokenize:
    """`tokenize` for a policy, whose records get the context `REFERENCE`: the very same tokens of
    their responses, behind the prompt as the reference's template and images make it.

    The function raises `UnusableRow` as `tokenize` does, also for what the reference cannot take,
    and where responses show images, whose tokens are a family's own.
    """

    def tokenize_both(
        record: Record, processor: Processor, max_prompt: int, max_response: int
    ) -> TokenizedRecord:
        ours = tokenize(record, processor, max_prompt, max_response)
        if not record.prompt:
            raise UnusableRow("no_prompt", "the row's responses do not share a prompt")
        media = (*processor.placeholders, *reference.placeholders)
        if any(np.isin(response.ids, media).any() for response in ours.responses):
            raise UnusableRow("image_position", "a response shows images")
        if not all(response.loss_mask.any() for response in ours.responses):
            raise UnusableRow("empty_response", "a response without a token of the assistant")
        problem = unsupported(record, reference)
        if problem is not None:
            raise UnusableRow(problem[0], f"{problem[1]}: {reference.folder}")
        asked = dataclasses.replace(record, responses=())
        theirs = tokenize(asked, reference, max_prompt, max_response)
        longest = max((len(response.ids) for response in ours.responses), default=0)
        limit = reference.config.decoder.position_limit
        if limit is not None and len(theirs.prompt_ids) + longest > limit:
            raise UnusableRow(
                "prompt_too_long",
                f"{len(theirs.prompt_ids)} and {longest} tokens, the reference's positions end at "
                f"{limit}",
            )
        theirs = dataclasses.replace(theirs, responses=ours.responses)
        return dataclasses.replace(ours, others=((REFERENCE, theirs),))

    return tokenize_both


def of_policy(records: Sequence[TokenizedRecord]) -> list[TokenizedRecord]:
    """Records of `tokenizer_for_both` as the policy takes them."""
    return [dataclasses.replace(record, others=()) for record in records]


def of_reference(records: Sequence[TokenizedRecord]) -> list[TokenizedRecord]:
    """Records of `tokenizer_for_both` as the reference takes them."""
    return [dict(record.others)[REFERENCE] for record in records]


def have_same_tokenizer(policy: Processor, reference: Processor) -> bool:
    """Whether the same ids mean the same text to both, see `check_same_tokenizer`."""
    try:
        check_same_tokenizer(policy, reference)
    except MmpoError:
        return False
    return True
