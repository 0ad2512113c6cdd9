"""What recipes have in common."""

from __future__ import annotations

from typing import Literal

from mmpo_jax.core.sections import MeshSize, Section, Seed

Template = Literal["auto", "vicuna_v1"]
Attention = Literal["auto", "xla", "splash", "cudnn"]


class Devices(Section):
    """Mesh sizes; -1 takes the devices the others leave. Where none is given, a training chooses
    them by its batch and its model."""

    data: MeshSize | None = None
    """By default the number of slices."""
    fsdp: MeshSize | None = None
    """By default what the others leave."""
    expert: MeshSize | None = None
    """Experts are split over it, and all else as over a larger `fsdp`. By default 1."""
    tensor: MeshSize | None = None
    """By default 1."""


class Base(Section):
    """What every recipe has."""

    seed: Seed = 0
    output: str
    """Folder everything is written to; running again goes on where it stopped. Where the result is
    one JSONL file, this may be its name."""
    model: str
    """Checkpoint folder, or one of an adapter in PEFT's format, which is merged into the model it
    names; `builtin:picture_world` is the checkpoint that ships with the package."""
    template: Template = "auto"
    """How dialogues become text; `auto` is the checkpoint's own chat template. The one that
    LLaVA-1.5 has on the hub is not what it was trained with: `vicuna_v1` is, and RLAIF-V's choice.
    Results are saved with it."""
    devices: Devices = Devices()
    attention: Attention = "auto"
    """What computes it; `auto` is splash attention on TPU, cuDNN on GPU, XLA elsewhere."""
