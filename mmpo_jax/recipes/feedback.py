"""How responses of a round get their scores: the judges of a recipe, with their options."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.sections import PositiveInt, Section, check_places
from mmpo_jax.recipes.base import Template
from mmpo_jax.recipes.rewards import SECTIONS, RewardSection
from mmpo_jax.recipes.scoring import ImplicitReward, RewardModelAsked
from mmpo_jax.rewards import REWARDS


class Judging(Section):
    """What all judges that may fail have."""

    max_failed: float = Field(0.1, ge=0, le=1)
    """Share of the responses that may fail, such as by replies that nobody can read, before the run
    stops; two may in any case, unless it is 0."""


class CheckpointAsked(Section):
    """A checkpoint that is asked through the project's own engine."""

    type: Literal["checkpoint"] = "checkpoint"
    model: str | None = None
    """Folder, hub id or bucket, as the recipe's `model`; by default that is it."""
    template: Template = "auto"
    """How dialogues become text; where `model` is the recipe's, its own `template` holds."""
    batch_size: PositiveInt = 16
    """Prompts at a time."""

    @pydantic.model_validator(mode="after")
    def _of_model(self) -> CheckpointAsked:
        if self.model is None and self.template != "auto":
            raise ValueError("template: the recipe's model has the recipe's `template`")
        return self


class ChatAsked(ChatServer):
    """A model behind a server that speaks the OpenAI chat protocol, see docs/feedback.md."""

    type: Literal["chat"] = "chat"


class Speaking(Section):
    """How a model writes its replies."""

    temperature: float = Field(0.2, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: PositiveInt = 1024
    """Of a reply; one that ends there is asked for again with twice as many."""
    attempts: PositiveInt = 3
    """How often a reply that cannot be read is asked for, the first time included."""


class PictureWorldSplitting(Section):
    """The rule for captions of the picture world."""

    type: Literal["picture_world"] = "picture_world"
    whole: bool = False
    """Whether a caption is one claim, with one question about all groups that it mentions."""


class WholeSplitting(Section):
    """Nothing is divided: a response is one claim, and the labeler is asked about all of it."""

    type: Literal["whole"] = "whole"
    prompt: str | None = None
    """The question instead of the built-in one, with {answer} in it; {question} is the prompt's."""

    @pydantic.model_validator(mode="after")
    def _asks(self) -> WholeSplitting:
        check_places("prompt", self.prompt, ("{answer}",))
        return self


class Splitting(Speaking):
    """How a language model is asked for claims."""

    style: Literal["json", "rlaif_v"] = "json"
    """`json`: one object with claims and their questions. `rlaif_v`: RLAIF-V's two fine-tuned
    models, which list facts and then questions under headings."""
    prompt: str | None = None
    """What is asked instead of the built-in prompt, with {question} and {answer} in it."""
    question_prompt: str | None = None
    """Of `rlaif_v`, what turns facts into questions, with {facts} in it."""
    question_model: str | None = None
    """Of `rlaif_v`, the second model; the first by default."""

    @pydantic.model_validator(mode="after")
    def _of_style(self) -> Splitting:
        for name in ("question_prompt", "question_model"):
            if self.style == "json" and getattr(self, name) is not None:
                raise ValueError(f"{name}: only style rlaif_v asks for questions by themselves")
        check_places("prompt", self.prompt, ("{question}", "{answer}"))
        check_places("question_prompt", self.question_prompt, ("{facts}",))
        return self


class ChatSplitting(ChatAsked, Splitting):
    """A served language model that splits responses into claims."""


class CheckpointSplitting(CheckpointAsked, Splitting):
    """A checkpoint, of a text family too, that splits responses into claims."""


class CheckpointLabeling(CheckpointAsked):
    """A checkpoint that is asked whether claims are true."""

    batch_size: PositiveInt = 16
    """Images at a time that have up to 16 questions; of those with more fewer, as many tokens."""


class ChatLabeling(ChatAsked):
    """A served model that is asked whether claims are true."""

    read: Literal["auto", "logprobs", "samples", "text"] = "auto"
    """Where the answer is read: in the `logprobs` of the first token, as the share of yes among
    `samples` drawn at temperature 1, or in one reply's `text`. `auto` takes the first of logprobs
    and samples that the server can give."""
    samples: PositiveInt = 5
    """Number of replies that are drawn for a share."""
    attempts: PositiveInt = 3
    """How often an answer that is neither yes nor no is asked for."""


Splitter = Annotated[
    PictureWorldSplitting | WholeSplitting | ChatSplitting | CheckpointSplitting,
    Field(discriminator="type"),
]
Labeler = Annotated[CheckpointLabeling | ChatLabeling, Field(discriminator="type")]


class ClaimsFeedback(Judging):
    """RLAIF-V's divide and conquer: responses become claims, and claims become verdicts."""

    type: Literal["claims"] = "claims"
    splitter: Splitter = PictureWorldSplitting()
    labeler: Labeler = CheckpointLabeling()
    suffix: str = " Please answer yes or no."
    """Follows every question (RLAIF-V's wording)."""
    score: Literal["count", "fraction", "log_odds"] = "count"
    """Of a response, by the verdicts on its claims: minus the number of rejected ones, the share of
    accepted ones, or the sum of their log-odds."""
    duplicate_claims: Literal["keep", "drop_response"] = "keep"
    """What becomes of responses that make a claim twice; RLAIF-V's code in effect drops them."""


class SelfRewardFeedback(Judging, Speaking):
    """The baseline of RLAIF-V: one long prompt that asks a labeler for a number."""

    type: Literal["self_reward"] = "self_reward"
    labeler: Annotated[CheckpointAsked | ChatAsked, Field(discriminator="type")] = CheckpointAsked()
    prompt: str | None = None
    """What is asked instead of the built-in prompt, with {question} and {answer} in it; {solution}
    is the row's own answer."""
    low: float = 0
    high: float = 10
    """Range of the number; others cannot be read."""
    max_new_tokens: PositiveInt = 256

    @pydantic.model_validator(mode="after")
    def _possible(self) -> SelfRewardFeedback:
        if not self.low < self.high:
            raise ValueError("low: must be below high")
        check_places("prompt", self.prompt, ("{question}", "{answer}"))
        return self


class PairFeedback(Judging, Speaking):
    """A language model that says which of two responses is better, asked in both orders.

    The score is the share of comparisons that a response wins; one that the orders disagree on is
    half won.
    """

    type: Literal["pair_judge"] = "pair_judge"
    labeler: Annotated[CheckpointAsked | ChatAsked, Field(discriminator="type")] = CheckpointAsked()
    prompt: str | None = None
    """What is asked instead of the built-in prompt, with {question}, {first} and {second} in it. A
    reply ends with `<answer> 1 </answer>`, with `[[A]]`, or with "Overall Judgment: Answer 1 is
    better"."""
    opponents: PositiveInt | None = None
    """How many others a response is compared with; by default all, which for n different responses
    are n (n - 1) questions a prompt."""
    max_new_tokens: PositiveInt = 512

    @pydantic.model_validator(mode="after")
    def _asks(self) -> PairFeedback:
        check_places("prompt", self.prompt, ("{question}", "{first}", "{second}"))
        return self


class ImplicitFeedback(ImplicitReward):
    """DPO's own reward under two checkpoints, such as an aligned model and what it started from."""

    type: Literal["implicit"] = "implicit"
    policy: str
    """Checkpoint whose log-probs count up."""
    reference: str
    """Checkpoint with the same tokenizer, whose log-probs count down."""
    batch_size: PositiveInt = 8
    """Prompts at a time."""


class RewardModelFeedback(RewardModelAsked):
    """What a reward model says of every response, the mean over its critiques (docs/reward.md)."""

    type: Literal["reward_model"] = "reward_model"


class SourceFeedback(Section):
    """The order of sources: what comes from an earlier one is better, and nobody is asked."""

    type: Literal["source"] = "source"
    order: tuple[str, ...] = Field(min_length=2)
    """Names of all `candidates`, the best first."""


class ScoresFeedback(Section):
    """What the data say that their own responses are worth."""

    type: Literal["scores"] = "scores"
    name: str | None = None
    """Which of several scores, by its name; by default the only one."""
    by: Literal["score", "rank"] = "score"
    """`rank`: minus the rank, of data that say which responses are better and not how good."""

    @pydantic.model_validator(mode="after")
    def _of_scores(self) -> ScoresFeedback:
        if self.by == "rank" and self.name is not None:
            raise ValueError("name: ranks have none")
        return self


def _of_claims(given: Any) -> Any:
    """The section with RLAIF-V's judge where it names none."""
    name = given.get("type") if isinstance(given, dict) else None
    if name in REWARDS and REWARDS[name].reads == "tokens":
        raise ValueError(
            f"{name} reads the tokens of a rollout, which responses of rounds have not"
        )
    return {"type": "claims", **given} if isinstance(given, dict) else given


if TYPE_CHECKING:
    Feedback = (
        ClaimsFeedback
        | SelfRewardFeedback
        | PairFeedback
        | ImplicitFeedback
        | RewardModelFeedback
        | SourceFeedback
        | ScoresFeedback
        | RewardSection
    )
else:
    _ANY = functools.reduce(
        operator.or_,
        (
            ClaimsFeedback,
            SelfRewardFeedback,
            PairFeedback,
            ImplicitFeedback,
            RewardModelFeedback,
            SourceFeedback,
            ScoresFeedback,
            *(section for name, section in SECTIONS.items() if REWARDS[name].reads != "tokens"),
        ),
    )
    Feedback = Annotated[_ANY, Field(discriminator="type"), pydantic.BeforeValidator(_of_claims)]
    """One judge, by `type`; `claims` where none is named."""
