"""Prompts with places for what they ask about."""

from __future__ import annotations

import re


def fill(prompt: str, **values: str) -> str:
    """A prompt with its places filled, all at once: what is filled in is not looked at again."""
    names = "|".join(values)
    return re.sub(r"\{(" + names + r")\}", lambda found: values[found[1]], prompt)
