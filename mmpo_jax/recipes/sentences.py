"""Rounds whose responses are sampled and judged sentence by sentence."""

from __future__ import annotations

import re

import pydantic

from mmpo_jax.core.sections import PositiveInt, Section


class Sentences(Section):
    """Pairs of sentences that go on from the same beginning of an answer, as SENTINEL makes them
    (Peng et al. 2025, arXiv 2507.12455)."""

    max_sentences: PositiveInt = 8
    """Sentences of an answer, at most."""
    clean: float = 0.0
    """Score from which on a sentence is clean: it may be chosen, and answers may go on from it. 0
    is that no claim was rejected, where they are counted; other scores need their own."""
    end: str | None = None
    """Regular expression of what ends a sentence and belongs to it; a rule for prose by default."""

    @pydantic.field_validator("end")
    @classmethod
    def _ends_something(cls, end: str | None) -> str | None:
        if end is None:
            return None
        try:
            matches_nothing = re.compile(end).match("") is not None
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        if matches_nothing:
            raise ValueError("it is found where nothing stands, so sentences would be empty")
        return end
