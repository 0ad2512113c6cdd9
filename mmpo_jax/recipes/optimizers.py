"""Sections of a recipe that say how weights follow the gradient: the optimizer and the schedule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field

from mmpo_jax.core.sections import PositiveInt, Section, type_by_default

Moments = Literal["float32", "bfloat16", "int8"]
"""How the optimizer's moments are kept: 4, 2 or some 1.1 bytes for each (`training/moments.py`)."""


class OptimizerSection(Section):
    """What all optimizers have."""

    learning_rate: float = Field(5e-7, gt=0)
    """The highest; `schedule` says when."""
    weight_decay: float = Field(0.01, ge=0)
    """Decay of weights per step, times the learning rate; biases and norms have none."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The global norm that gradients are clipped to."""


class MomentsSection(OptimizerSection):
    """What optimizers have that keep moments as large as their parameters."""

    moments: Moments = "float32"
    offload: bool = False
    """The moments wait in the host's memory, and come to the devices a layer at a time."""

    @pydantic.model_validator(mode="after")
    def _whole_on_the_host(self) -> MomentsSection:
        if self.offload and self.moments != "float32":
            raise ValueError(
                f"offload: moments on the host are float32, not {self.moments}; leave out one"
            )
        return self


class AdamW(MomentsSection):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    type: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)


class Adafactor(OptimizerSection):
    """Second moments of a matrix as a row and a column, no first ones (Shazeer and Stern 2018,
    arXiv 1804.04235), with the learning rate as given instead of relative steps."""

    type: Literal["adafactor"] = "adafactor"
    decay_rate: float = Field(0.8, gt=0, lt=1)
    """Step t keeps 1 - t^-decay_rate of the second moments."""
    clipping_threshold: float = Field(1.0, gt=0)
    """Root mean square that the update of a matrix is clipped to, before the learning rate."""
    scale_parameter: bool = False
    """Multiplies the update of a matrix by the root mean square of its weights."""
    min_dim_size_to_factor: PositiveInt = 128
    """Matrices with a side below have whole second moments."""


class Lion(MomentsSection):
    """The sign of a momentum (Chen et al. 2023, arXiv 2302.06675). Its learning rates are 3 to 10
    times smaller than AdamW's, and its weight decay is larger by as much."""

    type: Literal["lion"] = "lion"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)


class Muon(MomentsSection):
    """Orthogonalised momentum for the matrices of layers and projectors (Jordan et al. 2024), in
    steps of AdamW's size (0.2 sqrt(max(inputs, outputs)), Liu et al. 2025, arXiv 2502.16982), so
    that one learning rate serves both; AdamW for embeddings, the head, biases and norms."""

    type: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    steps: PositiveInt = 5
    """Newton-Schulz iterations."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's, as the next two."""
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)


def _warmup_moved(options: Any) -> Any:
    """Refuses an option that was once one of AdamW's."""
    if isinstance(options, dict) and "warmup_ratio" in options:
        raise ValueError(
            "warmup_ratio belongs to the schedule now: write "
            f"`training.schedule: {{warmup_ratio: {options['warmup_ratio']}}}`"
        )
    return options


Optimizer = Annotated[
    AdamW | Adafactor | Lion | Muon,
    Field(discriminator="type"),
    BeforeValidator(type_by_default("adamw")),
    BeforeValidator(_warmup_moved),
]


class ScheduleSection(Section):
    """What all schedules have."""

    warmup_ratio: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises, rounded up to a whole step."""


class Cosine(ScheduleSection):
    """Warm-up, then half a cosine down."""

    type: Literal["cosine"] = "cosine"
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Share of the learning rate that is left behind the last step."""


class Linear(ScheduleSection):
    """Warm-up, then a line down."""

    type: Literal["linear"] = "linear"
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Share of the learning rate that is left behind the last step."""


class Constant(ScheduleSection):
    """Warm-up, then the learning rate as it is."""

    type: Literal["constant"] = "constant"


class WarmupStableDecay(ScheduleSection):
    """Warm-up, the learning rate as it is, then down (Hu et al. 2024, arXiv 2404.06395)."""

    type: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which it goes down."""
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear"
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Share of the learning rate that is left behind the last step."""


Schedule = Annotated[
    Cosine | Linear | Constant | WarmupStableDecay,
    Field(discriminator="type"),
    BeforeValidator(type_by_default("cosine")),
]
