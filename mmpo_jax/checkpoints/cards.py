"""The model card: what a trained checkpoint was made of, as the hub shows it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mmpo_jax.checkpoints.folders import split_hub_id
from mmpo_jax.core.files import null_if_not_finite, read_json, write_atomic
from mmpo_jax.core.processes import on_one
from mmpo_jax.models.model import Model
from mmpo_jax.models.quantized import Quantization
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.train_recipe import TrainRecipe

FILE = "README.md"
SAVED = "card.json"
"""File beside a run's checkpoints: the card of what is converted from them, without metrics."""

MARGIN = "rewards/margins"
ENOUGH = 0.9
"""Share of an update or of a margin; what keeps less is warned of."""


NOISE = 1e-5
"""Error of a margin: what float32 sums of log-probs, of some hundred nats, are off by."""


@dataclasses.dataclass(frozen=True)
class SavedWeights:
    """The dtype that weights were saved in, and what that left of the training."""

    dtype: str
    """A `SaveDtype`."""
    survived: float | None = None
    """Share of the update that is in the files; None where it was not compared."""
    metric: str = ""
    """What was measured with the run's weights and with the saved ones, if anything was."""
    rows: int = 0
    """Number of rows that it was measured on."""
    of_run: float = 0.0
    as_saved: float = 0.0
    unknown: str = ""
    """Why the update was not compared, if it should have been."""

    def lines(self) -> list[str]:
        """What there is to say, a sentence each."""
        if self.dtype == "float32":
            return ["Saved in float32: the weights of the run, nothing rounded."]
        how = "at random, up or down" if self.dtype.endswith("_stochastic") else "to the nearest"
        told = [f"Saved in {self.dtype.partition('_')[0]}, rounded {how}."]
        if self.survived is not None:
            told.append(f"{self.survived:.1%} of the update is in the saved weights.")
        if self.unknown:
            told.append(f"How much of the update is in them is not known: {self.unknown}.")
        if self.metric:
            told.append(
                f"{self.metric} of {self.rows} rows: {self.of_run:.4g} of the run, "
                f"{self.as_saved:.4g} as saved."
            )
        return told

    def is_lossy(self) -> bool:
        """Whether less than `ENOUGH` of the update is left, or the margin is off, up or down, by
        more than the rest of it."""
        if self.survived is not None and self.survived < ENOUGH:
            return True
        off = abs(self.as_saved - self.of_run)
        return self.metric == MARGIN and off > max((1 - ENOUGH) * abs(self.of_run), NOISE)


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a card says of a checkpoint."""

    base_model: str
    """Name of the start model, as the recipe has it."""
    is_on_hub: bool
    """Whether that is the name of a repository and not of a folder."""
    task: str
    """The hub's name of what the model does, such as image-text-to-text."""
    method: str
    """Name of the objective, such as dpo."""
    data: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    """The recipe's section, or several of a mixture."""
    recipe: Mapping[str, Any]
    """All of the recipe that the weights depend on."""
    metrics: Mapping[str, float]
    saved: SavedWeights | None = None
    """None where that is not known yet."""
    quantized_base: Quantization | None = None
    """The integers that the base was trained above as, if it was, see `weights.quantized_base`."""
    base_fingerprint: str = ""
    """Fingerprint of what training began with, see `checkpoint.Checkpoint`; empty in old cards."""


def make_card(
    recipe: TrainRecipe | AlignRecipe,
    model: Model,
    metrics: Mapping[str, float],
    *,
    from_hub: bool,
    base_fingerprint: str = "",
    quantized_base: Quantization | None = None,
) -> ModelCard:
    """The card of a recipe's result.

    Where the result lies is left out, so that the same run elsewhere writes the same card.

    Args:
      recipe: of the run.
      model: the architecture.
      metrics: what was measured last.
      from_hub: whether the recipe's model came from the hub.
      base_fingerprint: of what training began with.
      quantized_base: the integers that its kernels are, or lie near to.
    """
    return ModelCard(
        base_model=recipe.model,
        is_on_hub=from_hub,
        task="text-generation" if model.family.images is None else "image-text-to-text",
        method="+".join(section.type for section in recipe.training.objective),
        data=recipe.model_dump(mode="json")["data"],
        recipe=recipe.model_dump(mode="json", exclude={"output", "hub"}),
        metrics=metrics,
        quantized_base=quantized_base,
        base_fingerprint=base_fingerprint,
    )


def write_card(folder: str | os.PathLike[str], card: ModelCard) -> None:
    """Writes the card of a checkpoint folder."""
    on_one(lambda: write_atomic(os.path.join(folder, FILE), render_card(card).encode()))


def save_card(folder: str | os.PathLike[str], card: ModelCard) -> None:
    """Writes the card for `read_card`."""
    values = null_if_not_finite(dataclasses.asdict(card))
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(os.path.join(folder, SAVED), text.encode())


def read_card(folder: str | os.PathLike[str], metrics: Mapping[str, float]) -> ModelCard | None:
    """The card that `save_card` wrote, with metrics; None where there is none."""
    values = read_json(os.path.join(folder, SAVED))
    return ModelCard(**{**values, "metrics": metrics}) if values else None


def read_saved(values: Mapping[str, Any]) -> SavedWeights:
    """The fields from JSON, in which numbers that are not finite are null."""
    margins = {name: values[name] for name in ("of_run", "as_saved")}
    known = {name: math.nan if value is None else value for name, value in margins.items()}
    return SavedWeights(**{**values, **known})


def render_card(card: ModelCard) -> str:
    """Markdown under the front matter that the hub reads.

    Holds no time, so that the same run writes the same card again.
    """
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": card.task,
        "tags": ["mmpo_jax", card.method],
    }
    if card.is_on_hub:
        front["base_model"], _ = split_hub_id(card.base_model)
    metrics = [f"| {name} | {value:.6g} |" for name, value in card.metrics.items()]
    table = ["| metric | value |", "|---|---|", *metrics] if metrics else ["None were measured."]
    weights = [] if card.saved is None else card.saved.lines()
    if card.quantized_base is not None:
        weights.append(
            f"Trained above a base of {card.quantized_base}, which these kernels lie near to: "
            "quantised again they would lose most of the training."
        )
    saved = ["## Weights\n\n" + "\n".join(weights)] if weights else []
    parts = [
        f"---\n{_yaml(front)}---",
        f"`{card.base_model}` after {card.method.upper()} with mmpo_jax.",
        f"## Data\n\n```yaml\n{_yaml(card.data)}```",
        "## Metrics\n\n" + "\n".join(table),
        *saved,
        f"## Recipe\n\n```yaml\n{_yaml(card.recipe)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _yaml(values: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
