"""Preference objectives over pairs of whole instructions and responses."""

from __future__ import annotations

from jaxtyping import Array, Float

from mmpo_jax.objectives.pairs import Side, pairwise
from mmpo_jax.objectives.preference import logistic
from mmpo_jax.objectives.registry import Positive, RowOptions, Rows


@pairwise(
    "reference",
    rows=RowOptions({"joint": (bool, True)}, lambda options: Rows(joint=options["joint"])),
)
def jpo(chosen: Side, rejected: Side, *, beta: Positive = 0.1) -> Float[Array, "N K"]:
    """JPO: -log sigmoid(beta D) of log pi(x, y), where each side has a prompt x of its own.

    Bansal et al. 2024 (DOVE, arXiv 2404.00530): preferences over pairs of instruction and response.
    With `joint`, prompts count as responses do, from the images on; without, responses alone, each
    after its own prompt.
    """
    return logistic(beta * (chosen.ratio - rejected.ratio))
