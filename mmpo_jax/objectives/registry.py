"""The registry of objectives: name -> function, options, and what it needs.

An objective is a function whose keyword arguments are its options in a recipe. Its docstring begins
with a line `NAME: formula` and goes on with the source; `mmpo objectives` prints both.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.sections import CritiqueLayout, keyword_options
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
OtherImageKind = Literal["crop", "rotate", "black", "blank", "noise", "masked", "data"]
DiffusionStep = Annotated[int, Field(ge=0, lt=1000)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
PositiveSmoothing = Annotated[float, Field(gt=0, lt=0.5)]
Count = Annotated[int, Field(gt=0, strict=True)]
"""Types of options."""

FIELDS = {
    "rank": "an order of the responses: chosen before rejected, or a rank each",
    "score": "a score of every response",
    "scores": "scores of every response in several dimensions; `scores/NAME` is one of them",
    "win_rate": "how likely a response beats one of its row, made of scores as logits",
    "consistency": "a score of that name: how far two models agree on the ranking, 0 to 1",
    "gold": "a best response beside two or more that are ranked below it",
    "desirable": "whether a response is desirable",
    "token_weights": "spans of every response with a weight",
    "phrases": "spans of every response with the number of a phrase",
    "changed": "spans of changed segments, or pairs, whose texts are compared",
    "turn": "turns of the assistant after the response",
    "other_models": "log-probs per token under other models: scores called `log_prob/MODEL`",
    "critique": "a critique of any response; of data without, leave `critique` out",
    "ranks": "a rank of every response; those of a row may all be the same",
    "advantages": "rewards of sampled responses against each other: on-policy training makes them",
}
"""What the data have to say of every response, by the names objectives use."""


def is_field(need: str) -> bool:
    """Whether a need is said by the data."""
    return need.partition("/")[0] in FIELDS


SHARED = {
    "ld_alpha": "LD-DPO (arXiv 2409.06411), 0 to 1: the weight of tokens beyond the shorter length",
    "wpo": "WPO (arXiv 2406.11827): whether pairs are weighed by how likely the policy says them",
    "divergence": "reverse_kl, forward_kl, js or alpha (arXiv 2309.16240); see divergence_alpha",
    "image": "the other image: crop, rotate, black, blank, noise (of noise_step of 1000), masked "
    "(of a mask_share of its patches), data",
    "joint": "whether prompts count too, where the two sides have prompts of their own",
}
"""Options that many objectives have."""

STATISTICS = {
    "collision": "log of the probability that two draws of a token agree, log sum p^2",
    "logit": "the logit of the token",
    "kl": "KL(reference || policy) at the token, over the vocabulary",
    "own": "the log-prob of the token that is most probable after the other image",
    "entropy": "the entropy of the distribution at the token",
    "divergence": "how far the distribution at the token is from the teacher's, see `Divergence`",
}
"""What the policy says of every token beside its log-prob."""

REFERENCES = {
    "reference": "log-probs under a reference",
    "reference_tokens": "log-probs under a reference, token by token",
    "reference_model": "a reference that runs in the step (reference: online or ema)",
}
"""What of the reference is needed; `reference_tokens` and `reference_model` include the first."""

VIEWS = {
    "other_image": "the responses after another image: made by the option `image`, or the data's",
    "mismatched": "the responses of a record before, to another prompt or image, after this prompt",
}
"""Names of views: the same texts after another prompt, or others after the same."""

HEADS = {
    "reward_head": "a model with a head that gives a response a reward (`reward_head`)",
}
"""What models may have beside their language-model head."""

TEACHERS = {
    "teacher": "a teacher (`training.teacher`), whose distributions are learned",
}
"""Other models that run in the step."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a policy is from its teacher, see `distillation.token_divergence`."""

    beta: float
    """0 is the forward KL divergence, 1 the reverse one, between them the generalized
    Jensen-Shannon divergence."""
    top_k: int | None = None
    """So many of the teacher's most probable tokens count by themselves, and all others as one;
    None for all."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """How responses are read that a reward head scores: to their end, and none of their tokens is
    learned but those of a critique."""

    critique_prompt: str | None = None
    """What the user says behind a response, before its critique; None where critiques are not
    read."""
    markers: bool = False
    """Whether the tokens that the chat template writes around turns are learned too."""
    layout: CritiqueLayout = "turns"
    """Where the response stands: before the prompt, or within it."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What an objective reads beside a record's own responses to its own prompt."""

    other_image: OtherImageKind | None = None
    """How images are changed, or `data` for those that the data give: the responses are read once
    more after the other image."""
    noise_step: int = 0
    """Step of diffusion, of the kind `noise`."""
    mask_share: float = 0.0
    """Share of the patches that are hidden, of the kind `masked`."""
    joint: bool = False
    """Whether prompts are learned with the responses."""
    mismatched: bool = False
    """Whether responses of another record are read after this one's prompt."""
    scored: Scored | None = None
    """How a reward head reads responses; None where none does."""
    divergence: Divergence | None = None
    """How far a teacher is measured; None where no teacher is read."""

    @property
    def views(self) -> frozenset[str]:
        """Names in `VIEWS`."""
        asked = {"other_image": self.other_image is not None, "mismatched": self.mismatched}
        return frozenset(name for name, is_asked in asked.items() if is_asked)


def own_rows(options: Mapping[str, Any]) -> Rows:
    """What an objective reads that looks at a record's own responses alone."""
    return Rows()


def check_nothing(options: Mapping[str, Any]) -> None:
    """The check of an objective or a reward whose options fit together whatever they are."""


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """Options of an objective that say which rows it reads."""

    options: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    """name -> (type, default)."""
    rows: Callable[[Mapping[str, Any]], Rows] = own_rows
    """See `Objective.rows`."""


def other_image(default: OtherImageKind) -> RowOptions:
    """Options `image`, `noise_step` and `mask_share` of an objective that compares with another
    image."""

    def rows(options: Mapping[str, Any]) -> Rows:
        share = options["mask_share"] if options["image"] == "masked" else 0.0
        return Rows(options["image"], options["noise_step"], share)

    return RowOptions(
        {
            "image": (OtherImageKind, default),
            "noise_step": (DiffusionStep, 500),
            "mask_share": (PositiveShare, 0.6),
        },
        rows,
    )


State = dict[str, Float[Array, ""]]
"""name -> float32[]: what an objective keeps from step to step."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss by its name."""

    name: str
    kind: str
    """What it compares: pairs, rankings, single responses, ..."""
    function: Callable[..., Any]
    """The function that was registered."""
    apply: Callable[[Responses, Float[Array, " N"], State, Mapping[str, Any]], tuple[Sums, State]]
    """(responses [N, S], weights float32[N], state, options) -> (sums, state)."""
    needs: frozenset[str]
    """Names in `FIELDS`, `STATISTICS`, `REFERENCES`, `HEADS` and `TEACHERS`."""
    coupled: bool = False
    """Whether the loss of a row depends on the others of the batch."""
    state: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """First values of what is kept from step to step."""
    shared_options: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    """Options of all objectives of its kind: name -> (type, default)."""
    option_needs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Option -> what is needed besides where it is used: given, if it is None by default, and
    neither 0 nor False otherwise."""
    rows: Callable[[Mapping[str, Any]], Rows] = own_rows
    """All options -> what is read beside a record's own responses."""
    coupled_by: frozenset[str] = frozenset()
    """Options that make the loss of a row depend on the others, where they are used."""
    token_limit: str | None = None
    """Option that is the rollout's limit of tokens where it is not given."""
    check: Callable[[Mapping[str, Any]], None] = check_nothing
    """Raises ValueError for options that do not fit together."""

    @property
    def options(self) -> dict[str, tuple[Any, Any]]:
        """Options of a recipe: name -> (type, default), `...` where it has to be given."""
        return {**keyword_options(self.function), **self.shared_options}

    @property
    def defaults(self) -> dict[str, Any]:
        """Options that need not be given: name -> value."""
        return {name: value for name, (_, value) in self.options.items() if value is not ...}

    @property
    def formula(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def source(self) -> str:
        paragraphs = (inspect.getdoc(self.function) or "").split("\n\n")
        said = itertools.takewhile(lambda text: not text.startswith("Args:"), paragraphs[1:])
        return " ".join(said).replace("\n", " ")


OBJECTIVES: dict[str, Objective] = {}


def register(objective: Objective) -> None:
    """
    Raises:
      ValueError: the name is taken, or it needs something that nothing gives.
    """
    known = {*FIELDS, *STATISTICS, *REFERENCES, *HEADS, *TEACHERS}
    unknown = {*objective.needs, *itertools.chain(*objective.option_needs.values())} - known
    if objective.name in OBJECTIVES or unknown:
        raise ValueError(f"objective {objective.name}: taken, or needs {unknown}")
    OBJECTIVES[objective.name] = objective


def call(
    function: Callable[..., Any],
    responses: Sequence[Any],
    weights: Float[Array, "*d"],
    state: State,
    options: Mapping[str, Any],
    *,
    coupled: bool,
    stateful: bool,
) -> tuple[Float[Array, "*d"], State]:
    """(loss, state) of an objective as it is written, whatever it takes and gives.

    Args:
      function: takes `responses`, the weights of what they are where it is coupled, the state
        where it keeps one, and its options.

    Raises:
      MmpoError: the loss is not a number for each of what has a weight, such as a mean of them.
    """
    arguments = [*responses, *([weights] if coupled else []), *([state] if stateful else [])]
    result = function(*arguments, **options)
    loss, new_state = result if stateful else (result, state)
    if jnp.shape(loss) != weights.shape:
        raise MmpoError(
            f"objective {function.__name__}: the loss has shape {jnp.shape(loss)}, and it has to "
            f"be a number for everything that counts, {weights.shape}: no mean or sum over it"
        )
    return loss, new_state
