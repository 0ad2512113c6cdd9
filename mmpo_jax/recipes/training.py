"""Sections of a recipe that say how a training stage runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.dtypes import SaveDtype
from mmpo_jax.core.sections import PositiveInt, Section
from mmpo_jax.models.lora import Lora
from mmpo_jax.models.quantized import Quantization
from mmpo_jax.objectives.registry import REFERENCES, TEACHERS, VIEWS
from mmpo_jax.recipes.objectives import SECTIONS, Objectives
from mmpo_jax.recipes.optimizers import AdamW, Cosine, Optimizer, Schedule
from mmpo_jax.recipes.teacher import SelfTeacher, Teacher


class CachedReference(Section):
    """The start model's log-probs, computed once before training and stored."""

    type: Literal["cached"] = "cached"


class GivenReference(Section):
    """Log-probs that the data hold."""

    type: Literal["given"] = "given"
    check: bool = True
    """Stops before training where those of the first batch cannot be the start model's; `false`
    for those of another model."""


class OnlineReference(Section):
    """The start model runs in the step. With adapters it shares the weights of the policy and has
    no adapters; without, it holds a copy of what is trained."""

    type: Literal["online"] = "online"


class MovingReference(Section):
    """A model in the step that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv
    2404.09656, soft updates; `mixup: 1` are hard ones)."""

    type: Literal["ema"] = "ema"
    every: PositiveInt = 512
    """Steps between updates."""
    mixup: float = Field(0.6, gt=0, le=1)
    """Share of the policy: reference <- mixup * policy + (1 - mixup) * reference."""


class NoReference(Section):
    """No reference, for objectives that compare with none; others are refused."""

    type: Literal["none"] = "none"


Reference = Annotated[
    CachedReference | GivenReference | OnlineReference | MovingReference | NoReference,
    Field(discriminator="type"),
]


RUNNING = ("online", "ema")
"""Types of references that run in the step."""


class Profile(Section):
    """Steps that JAX's profiler traces, into `profile/` of the run's folder."""

    start: PositiveInt = 10
    """The first of them; the very first step compiles."""
    steps: PositiveInt = 3


class WandB(Section):
    """Metrics on Weights & Biases too (`pip install 'mmpo_jax[wandb]'`). The key is that of `wandb
    login` or WANDB_API_KEY: recipes hold none."""

    project: str
    entity: str | None = None
    """Whose project it is; by default the key's owner's."""
    name: str | None = None
    """Of the run; by default the output folder's, and the round of an alignment."""
    mode: Literal["online", "offline"] | None = None
    """`offline` keeps all in `wandb/` of the run's folder, for `wandb sync`; by default what
    WANDB_MODE says."""


class Training(Section):
    """One training stage."""

    objective: Objectives = (SECTIONS["dpo"](type="dpo"),)
    """One, or a list whose weighted losses are added up; `mmpo objectives` lists them."""
    reference: Reference = CachedReference()
    """What objectives compare the policy with."""
    teacher: Teacher | None = None
    """Whose distributions objectives of distillation learn."""
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Cosine()
    """Of the learning rate, over all steps."""
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    """Stops earlier than the epochs would; the schedule ends there too."""
    batch_size: PositiveInt = 8
    """Rows (pairs, dialogues, groups) per update, over all devices."""
    micro_batch_size: PositiveInt | None = None
    """Rows at a time, over all devices; the whole batch by default."""
    freeze: tuple[str, ...] = ()
    """Regular expressions over whole parameter paths; what they match is not trained."""
    lora: Lora | None = None
    """Trains adapters instead of the weights."""
    router_aux_loss_coef: float = Field(0.0, ge=0)
    """Weight of the loss by which tokens spread over a mixture's experts; 0 for none."""
    workers: PositiveInt = 2
    """Processes that tokenise the data before, and threads that make batches ready while a step
    runs."""
    remat: Literal["none", "dots", "full"] = "none"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What trained weights are kept in. In bfloat16 they take half of the memory, and every update
    is rounded stochastically; what they begin with is rounded to the nearest."""
    log_every: PositiveInt = 10
    save_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    """The last so many stay, so that where one is damaged the one before is there."""
    keep_best: PositiveInt = 1
    """Of rows held out, so many of the best steps stay in `best/`."""
    profile: Profile | None = None
    wandb: WandB | None = None
    save_dtype: SaveDtype = "float32"
    """Dtype of the result's weights. Training keeps float32, whatever the start has, and so nothing
    of it is lost; others round (docs/training.md), but for weights that `param_dtype` has in
    bfloat16 already. Rounds of an alignment go on from what training keeps."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Training:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of {micro}")
        self._check_reference()
        self._check_contexts()
        self._check_teacher()
        if self.lora is not None and self.param_dtype != "float32":
            raise ValueError("param_dtype: adapters are small, and trained in float32")
        if self.save_every % self.log_every:
            raise ValueError("save_every must be a multiple of log_every")
        return self

    @property
    def quantization(self) -> Quantization | None:
        """What the frozen kernels below adapters are kept in; None for what the files have."""
        return None if self.lora is None else self.lora.quantize_base

    def _check_contexts(self) -> None:
        """Refuses objectives that need different rows: all see one batch."""
        rows = [(section.type, section.term().rows) for section in self.objective]
        changing = [name for name, each in rows if each.other_image is not None]
        mismatched = [name for name, each in rows if each.mismatched]
        joint = [name for name, each in rows if each.joint]
        if mismatched and changing:
            raise ValueError(
                f"objective: {mismatched[-1]} and {changing[-1]} need different rows; "
                "train with one of them"
            )
        images = {
            (each.other_image, each.noise_step, each.mask_share)
            for _, each in rows
            if each.other_image
        }
        if len(images) > 1:
            raise ValueError(
                "objective: give all of the list the same image, noise_step and mask_share"
            )
        if joint and len(joint) < len(rows):
            raise ValueError(f"objective: {joint[0]} with joint reads rows otherwise")
        scored = [name for name, each in rows if each.scored is not None]
        others = [name for name, each in rows if each.scored is None]
        if scored and others:
            raise ValueError(
                f"objective: {scored[0]} is of reward models and {others[0]} of policies; train "
                "with one of them"
            )
        critiques = {each.scored for _, each in rows if each.scored and each.scored.critique_prompt}
        if len(critiques) > 1:
            raise ValueError("objective: give all critiques of the list the same options")

    def _check_teacher(self) -> None:
        learning = [s.type for s in self.objective if s.term().needs & TEACHERS.keys()]
        if learning and self.teacher is None:
            raise ValueError(f"teacher: {learning[0]} learns from one; give model or self")
        if self.teacher is not None and not learning:
            raise ValueError("teacher: no objective learns from it")
        own = isinstance(self.teacher, SelfTeacher)
        if own and self.reference.type not in RUNNING:
            raise ValueError(
                "teacher: a teacher of type self is the reference; take `reference: {type: online}`"
                " or ema"
            )
        divergences = {section.term().rows.divergence for section in self.objective} - {None}
        if len(divergences) > 1:
            raise ValueError(
                f"objective: give all {learning[0]} of the list the same beta and top_k"
            )
        changing = [s.type for s in self.objective if s.term().rows.other_image is not None]
        if learning and changing:
            raise ValueError(
                f"objective: {changing[0]} and {learning[0]} need different rows; train with one"
            )

    def _check_reference(self) -> None:
        enough = {
            "cached": {"reference", "reference_tokens"},
            "given": {"reference"},
            "none": set(),
        }.get(self.reference.type, REFERENCES.keys())
        for section in self.objective:
            needs = section.term().needs
            if self.reference.type == "given" and needs & VIEWS.keys():
                raise ValueError(
                    f"objective: {section.type} needs {VIEWS[min(needs & VIEWS.keys())]}, of which "
                    "the data give no log-probs; take `reference: {type: cached}`"
                )
            if self.reference.type == "given" and section.term().rows.joint:
                raise ValueError(
                    f"objective: {section.type} with joint counts prompts too, of which the data "
                    "give no log-probs; take `reference: {type: cached}` or `joint: false`"
                )
            lacking = (needs & REFERENCES.keys()) - enough
            if lacking:
                need = max(lacking)
                raise ValueError(
                    f"objective: {section.type} needs {REFERENCES[need]}, which `reference: "
                    f"{{type: {self.reference.type}}}` does not give"
                )

    def identity(self) -> dict[str, Any]:
        """The options the trained weights depend on."""
        without = {"log_every", "save_every", "keep_checkpoints", "keep_best", "profile"}
        without |= {"save_dtype", "wandb", "workers", "remat"}
        if self.lora is None or not self.lora.dropout:  # whose masks follow the micro-batches
            without.add("micro_batch_size")
        return self.model_dump(
            mode="json",
            exclude={
                **dict.fromkeys(without, True),
                "reference": {"check"},
                "optimizer": {"offload"},
            },
        )
