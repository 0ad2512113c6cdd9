"""Whether two checkpoints read the same ids as the same text."""

from __future__ import annotations

import json
from typing import Any

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.processor import Processor

SPLITTING = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""Parts of a tokenizer.json that say which ids a text becomes where no special tokens are added."""


def check_same_tokenizer(
    policy: Processor,
    reference: Processor,
    *,
    other: str = "reference",
    why: str = "rewards compare the same tokens",
) -> None:
    """
    Args:
      policy, reference: of the two checkpoints.
      other: what the second is to the policy.
      why: it matters.

    Raises:
      MmpoError: naming both, where a text is not the same ids for the two, or their vocabularies
        differ: the tokens of a response would be others.
    """
    named = f"{policy.folder} and {reference.folder}: policy and {other} have other tokenizers"
    ours, theirs = policy.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    apart = sorted(token for token in ours.keys() | theirs if ours.get(token) != theirs.get(token))
    if apart:
        token = apart[0]
        ids = " and ".join(str(ids.get(token, "none")) for ids in (ours, theirs))
        raise MmpoError(
            f"{named}: {len(apart)} tokens have other ids, the first is {token!r} with {ids}; {why}"
        )
    if _splitting(policy) != _splitting(reference):
        raise MmpoError(f"{named}, which split texts differently; {why}")


def _splitting(processor: Processor) -> Any:
    """How texts become tokens, but for the vocabulary."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(processor.tokenizer).__name__
    rules = json.loads(backend.to_str())
    return {name: rules.get(name) for name in SPLITTING}
