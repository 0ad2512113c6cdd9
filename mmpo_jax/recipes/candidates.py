"""Where the responses of a round come from: the `candidates` of a recipe, judged together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.sections import SECRET, PositiveInt, Section, as_list
from mmpo_jax.data.edits import DIFFUSION_STEPS
from mmpo_jax.data.records import EditKind
from mmpo_jax.recipes.base import Template
from mmpo_jax.recipes.sampling import Sampling

POLICY = "policy"
"""Name of the source that is the round's start model, sampled as `sampling` says."""

INLINE_KEY = re.compile(r"api[-_]key(\s*=\s*|\s+)(?![\"']?\$)\S", re.IGNORECASE)
"""A key in a command, as in `--api-key sk-...`, and not the variable that has it."""

SourceName = Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]


class PolicyCandidates(Section):
    """Samples of the model that the round starts from, as `sampling` says."""

    type: Literal["policy"] = "policy"

    @property
    def name(self) -> str:
        """Name of the source."""
        return POLICY

    def drawn(self, sampling: Sampling) -> Sampling:
        """How it draws, given the recipe's `sampling`."""
        return sampling


class GreedyCandidates(Section):
    """The greedy response of the model that the round starts from."""

    type: Literal["greedy"] = "greedy"

    @property
    def name(self) -> str:
        """Name of the source."""
        return "greedy"

    def drawn(self, sampling: Sampling) -> Sampling:
        """How it draws, given the recipe's `sampling`."""
        greedy = {"num_samples": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
        return sampling.model_copy(update=greedy)


class Drawing(Section):
    """How a source draws; what is not given is that of the recipe's `sampling`."""

    num_samples: PositiveInt | None = None
    """Samples of every prompt; 1 where its own `temperature` is 0."""
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    max_new_tokens: PositiveInt | None = None

    def drawn(self, sampling: Sampling) -> Sampling:
        """How it draws, given the recipe's `sampling`."""
        given = self.model_dump(include=set(Sampling.model_fields), exclude_none=True)
        others = sampling.model_dump()
        if given.get("temperature") == 0:
            del others["num_samples"]
        return Sampling(**(others | given))


class BatchedDrawing(Drawing):
    """How a source draws through the project's own engine."""

    batch_size: PositiveInt | None = None
    """Prompts at a time."""


class CheckpointCandidates(BatchedDrawing):
    """Samples of another model, which is loaded for them and then let go of."""

    type: Literal["checkpoint"] = "checkpoint"
    model: str
    """Folder, hub id or bucket, as the recipe's `model`."""
    template: Template = "auto"
    """How dialogues become text."""
    name: SourceName = "checkpoint"


class Changed(BatchedDrawing):
    """How the model is shown less of a prompt than there is."""

    per_sample: bool = False
    """Whether every sample is shown a change of its own, which is encoded for it; else all samples
    of a prompt see the same."""


class EditedImageCandidates(Changed):
    """Samples of the model that the round starts from, which is shown changed images."""

    type: Literal["edited_image"] = "edited_image"
    edit: EditKind = "noise"
    """How the images are changed."""
    step: int = Field(500, ge=0, lt=DIFFUSION_STEPS)
    """Step of diffusion, of `noise`."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of the patches that have the mean colour, of `masked`."""
    name: SourceName = "edited_image"


class HiddenImageCandidates(Changed):
    """Samples of the model that the round starts from, to which most of the image's tokens are
    hidden (BDHS)."""

    type: Literal["hidden_image"] = "hidden_image"
    share: float = Field(0.99, gt=0, le=1)
    """Probability that a token is hidden; the default is BDHS'."""
    name: SourceName = "hidden_image"


class ServedCandidates(Drawing, ChatServer):
    """Samples of a model behind a chat server: one that is up, or a copy of the model that the
    round starts from, which a command brings up."""

    type: Literal["served"] = "served"
    command: str | None = Field(None, min_length=1)
    """Shell command that serves the folder `$MMPO_MODEL` at `url`, under the name `model`, until it
    is ended; None asks a server that is up. A key stands in it by its variable's name alone."""
    start_timeout: float = Field(1800.0, gt=0)
    """Seconds that the command's server has to answer in."""
    shares_devices: bool = True
    """Whether the command's server computes on this run's devices: then the round's weights are let
    go of before it starts, and read again when they are needed."""
    max_failed: float = Field(0.1, ge=0, le=1)
    """Share of a part's responses that may fail before the run stops, and are left out; two may in
    any case, unless it is 0."""
    name: SourceName = "served"

    @pydantic.field_validator("command")
    @classmethod
    def _names_the_key(cls, command: str | None) -> str | None:
        if command is not None and INLINE_KEY.search(command):
            told = "no key stands in it; name its variable, as in `--api-key $MY_KEY`"
            raise PydanticCustomError(SECRET, told)
        return command

    @pydantic.model_validator(mode="after")
    def _of_command(self) -> ServedCandidates:
        for name in ("start_timeout", "shares_devices"):
            default = type(self).model_fields[name].default
            if self.command is None and getattr(self, name) != default:
                raise ValueError(f"{name}: it is about the server that `command` brings up")
        return self


class DataCandidates(Section):
    """The responses that the rows of the data hold."""

    type: Literal["data"] = "data"
    responses: Literal["all", "best"] = "all"
    """`best`: of rows that rank their responses those of the first rank, such as the chosen one."""

    @property
    def name(self) -> str:
        """Name of the source."""
        return "data"


Candidate = (
    PolicyCandidates
    | GreedyCandidates
    | CheckpointCandidates
    | EditedImageCandidates
    | HiddenImageCandidates
    | ServedCandidates
    | DataCandidates
)
CandidateSources = Annotated[
    tuple[Annotated[Candidate, Field(discriminator="type")], ...],
    pydantic.BeforeValidator(as_list),
    Field(min_length=1),
]
"""Sources, or one of them."""


def data_candidates(candidates: Sequence[Candidate]) -> DataCandidates | None:
    """The source that is the data, where it is one of them."""
    return next((source for source in candidates if isinstance(source, DataCandidates)), None)


def check_sources(candidates: Sequence[Candidate], sampling: Sampling) -> None:
    """
    Raises:
      ValueError: two sources have one name, or all responses to a prompt would be the same.
    """
    names = [source.name for source in candidates]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(
            f"candidates: two sources are called {repeated[0]!r}; give them names of their own "
            "(`name`), or list it once"
        )
    different = 0
    for source in candidates:
        if isinstance(source, DataCandidates):
            return
        drawn = source.drawn(sampling)
        different += 1 if drawn.temperature == 0 else drawn.num_samples
    if {POLICY, "greedy"} <= set(names) and sampling.temperature == 0:
        different -= 1  # the same response
    if different < 2:
        raise ValueError(
            "sampling: pairs are made of different responses to a prompt; give a temperature "
            "over 0 and num_samples over 1, or another source of candidates"
        )


def check_order(
    order: Sequence[str],
    names: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    min_difference: float,
) -> None:
    """Whether an order of sources makes pairs.

    Args:
      order: names of sources, the best first.
      names: of all sources.
      chosen, rejected: names of those that the sides of pairs may come from.
      min_difference: places in the order between the two.

    Raises:
      ValueError: it lacks a source or has one twice, or no chosen source is before a rejected one.
    """
    if sorted(order) != sorted(names):
        raise ValueError(f"feedback.order: name every source once: {', '.join(names)}")
    best = min(order.index(name) for name in chosen)
    worst = max(order.index(name) for name in rejected)
    if worst - best < min_difference:
        raise ValueError(
            f"feedback.order: no pair has its chosen response from {', '.join(chosen)}, its "
            f"rejected one from {', '.join(rejected)} and {min_difference:g} places between them"
        )
