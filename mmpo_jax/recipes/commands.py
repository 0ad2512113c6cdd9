"""Which recipe each command runs."""

from __future__ import annotations

from mmpo_jax.core.sections import Section
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.command_recipes import (
    CorrectRecipe,
    EvaluateRecipe,
    GenerateRecipe,
    RewardRecipe,
    ScoreRecipe,
    SelectRecipe,
    ServeRecipe,
)
from mmpo_jax.recipes.train_recipe import TrainRecipe

RECIPES: dict[str, type[Section]] = {
    "align": AlignRecipe,
    "train": TrainRecipe,
    "generate": GenerateRecipe,
    "score": ScoreRecipe,
    "reward": RewardRecipe,
    "select": SelectRecipe,
    "correct": CorrectRecipe,
    "serve": ServeRecipe,
    "evaluate": EvaluateRecipe,
}
"""Command -> class of its recipe."""
