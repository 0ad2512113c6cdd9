"""Prompts in which some of the image's tokens are seen by nobody, as BDHS hides them.

BDHS (Amirloo et al. 2024, arXiv 2407.02477) masks the attention to image tokens while a response
is generated. A token that no query sees changes nothing but its own state, which nobody reads, so
it is left out here: all others keep the positions that they have in the whole prompt, and compute
what they compute where a mask hides it. (Windows of attention count tokens, and reach further.)
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mmpo_jax.data.processor import Processor
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import SeenTokens, TokenizedRecord


def hide_image(
    record: TokenizedRecord, processor: Processor, share: float, seed: int
) -> TokenizedRecord:
    """The record with image tokens of its prompt left out, each with the probability `share`.

    Args:
      record: whose images are still all encoded.
      processor: of the checkpoint, knows image tokens.
      share: of the image tokens, in [0, 1].
      seed: of the draw.

    Raises:
      UnusableRow: the prompt has no image token.
    """
    is_image = np.isin(record.prompt_ids, processor.placeholders)
    if not is_image.any():
        raise UnusableRow("no_other_image", "there is no image to hide")
    drawn = np.random.default_rng(seed).random(len(is_image)) < share
    kept = np.flatnonzero(~(is_image & drawn)).astype(np.int32)
    seen = SeenTokens(record.prompt_ids, kept)
    return dataclasses.replace(record, prompt_ids=record.prompt_ids[kept], seen=seen)
