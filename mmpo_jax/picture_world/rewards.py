"""The reward of a caption in the picture world, whose scenes are known."""

from __future__ import annotations

from typing import Any

from mmpo_jax.core.errors import DataError
from mmpo_jax.objectives.registry import NonNegative
from mmpo_jax.picture_world.claims import is_true, parse
from mmpo_jax.picture_world.world import Scene
from mmpo_jax.rewards.registry import MAX_LENGTH, reward


@reward("a scene of the picture world, as its own records have it")
def picture_world_caption(
    text: str, solution: Any, *, invented: NonNegative = 1.0, recall: NonNegative = 1.0
) -> float:
    """`recall` * kinds named / kinds there - `invented` * mentions that are wrong / mentions.

    The picture world's own. What cannot be read counts as a wrong mention.
    """
    try:
        scene = Scene.from_dict(solution)
    except (ValueError, TypeError) as error:
        raise DataError(f"picture_world_caption compares with the solution: {error}") from error
    if len(text) > MAX_LENGTH:
        return 0.0
    parsed = parse(text)
    mentions = len(parsed.claims) + len(parsed.unparsed)
    wrong = sum(not is_true(claim, scene) for claim in parsed.claims) + len(parsed.unparsed)
    present = scene.counts().keys()
    named = len({claim.kind for claim in parsed.claims} & present)
    return recall * named / len(present) - invented * wrong / max(mentions, 1)
