"""The sizes that prompts and responses are padded to, as a recipe's section."""

import pydantic

from mmpo_jax.core.sections import PositiveInt, Section


class Lengths(Section):
    """Static shapes: the ascending sizes that prompts and responses are padded to."""

    prompt: tuple[PositiveInt, ...] = (64,)
    response: tuple[PositiveInt, ...] = (64,)

    @pydantic.field_validator("prompt", "response")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or list(sizes) != sorted(set(sizes)):
            raise ValueError("give one or more sizes in ascending order")
        return sizes
