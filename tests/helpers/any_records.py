"""Hypothesis strategies of tokenized records."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers import tiny
from hypothesis import strategies as st

from mmpo_jax.data.records import ImageRef, Response
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse
from mmpo_jax.models.layout import Layout
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene

IMAGES = tuple(ImageRef(str(i), png_bytes(sample_scene("train", 0, i))) for i in range(2))
N = 4
"""Tokens of an image."""
WORD = st.integers(tiny.FIRST_WORD, tiny.FIRST_WORD + 9)


@st.composite
def tokenized_responses(draw: Any, longest: int) -> TokenizedResponse:
    mask = draw(st.lists(st.booleans(), max_size=longest))
    ids = draw(st.lists(WORD, min_size=len(mask), max_size=len(mask)))
    return TokenizedResponse(np.array(ids, np.int32), np.array(mask, bool), 0, Response.of(""))


@st.composite
def tokenized_records(draw: Any, max_prompt: int, max_response: int) -> TokenizedRecord:
    """A record with up to two images anywhere in its prompt, and up to three responses."""
    ids = draw(st.lists(WORD, min_size=1, max_size=max_prompt - 2 * N))
    images = draw(st.lists(st.sampled_from(IMAGES), max_size=2))
    for _ in images:
        at = draw(st.integers(1, len(ids)))
        ids[at:at] = [tiny.IMAGE_ID] * N
    return TokenizedRecord(
        id="r",
        prompt_ids=np.array(ids, np.int32),
        responses=tuple(draw(st.lists(tokenized_responses(max_response), max_size=3))),
        images=tuple(images),
        layouts=tuple(Layout.plain(tiny.IMAGE_ID, N) for _ in images),
    )
