"""The judge that a recipe names, with the models that it asks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mmpo_jax.checkpoints.checkpoint import load_processor
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.skipped import Problem
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.usable import Unfit
from mmpo_jax.feedback.chat_labeler import CHAT_LABEL_RULES, ChatLabeler
from mmpo_jax.feedback.claims import ClaimsJudge
from mmpo_jax.feedback.given_judges import ScoresJudge, SourceJudge
from mmpo_jax.feedback.implicit_judge import ImplicitJudge
from mmpo_jax.feedback.judge import Judge
from mmpo_jax.feedback.labeler import CheckpointLabeler, Labeler, answer_tokens
from mmpo_jax.feedback.models import Models
from mmpo_jax.feedback.pair_judge import PairJudge
from mmpo_jax.feedback.reward_judge import RewardJudge
from mmpo_jax.feedback.reward_model_judge import RewardModelJudge
from mmpo_jax.feedback.self_reward import SelfRewardJudge
from mmpo_jax.feedback.served import ServedTextModel
from mmpo_jax.feedback.splitters import (
    ModelSplitter,
    PictureWorldSplitter,
    RlaifVSplitter,
    Splitter,
    WholeSplitter,
)
from mmpo_jax.feedback.text_model import CheckpointTextModel, TextModel
from mmpo_jax.recipes.feedback import (
    ChatAsked,
    ChatLabeling,
    ChatSplitting,
    CheckpointAsked,
    CheckpointLabeling,
    CheckpointSplitting,
    Feedback,
    ImplicitFeedback,
    PairFeedback,
    PictureWorldSplitting,
    RewardModelFeedback,
    ScoresFeedback,
    SelfRewardFeedback,
    SourceFeedback,
    Speaking,
    WholeSplitting,
)
from mmpo_jax.recipes.rewards import RewardSection


def make_judge(feedback: Feedback, models: Models) -> Judge:
    """The judge of a recipe's `feedback`.

    Args:
      feedback: the section.
      models: what it runs on.

    Raises:
      MmpoError: a checkpoint, a key or a function of the user's is not there.
    """
    if isinstance(feedback, RewardSection):
        return RewardJudge(feedback)
    if isinstance(feedback, SourceFeedback):
        return SourceJudge(feedback)
    if isinstance(feedback, ScoresFeedback):
        return ScoresJudge(feedback)
    if isinstance(feedback, ImplicitFeedback):
        return ImplicitJudge(feedback, models)
    if isinstance(feedback, RewardModelFeedback):
        return RewardModelJudge(feedback, models)
    if isinstance(feedback, SelfRewardFeedback):
        model, key, check = text_model(feedback.labeler, feedback, models)
        return SelfRewardJudge(feedback, model, key, [check])
    if isinstance(feedback, PairFeedback):
        model, key, check = text_model(feedback.labeler, feedback, models)
        return PairJudge(feedback, model, key, [check])
    splitter, checks = make_splitter(feedback.splitter, models)
    labeler, labeler_key, check = make_labeler(feedback.labeler, models)
    return ClaimsJudge(feedback, splitter, labeler, labeler_key, [*checks, check])


def unseen_by_judge(feedback: Feedback, models: Models) -> Unfit:
    """Why a prompt that the round's model takes cannot be shown to a checkpoint that judges: it has
    a video, of which that takes none."""

    @functools.cache
    def without_videos() -> str | None:
        judging = _checkpoints(feedback, models)
        return next((name[0] for name in judging if load_processor(*name).videos is None), None)

    def unfit(record: TokenizedRecord) -> Problem | None:
        if not record.videos or without_videos() is None:
            return None
        return "unsupported_video", f"{without_videos()}, which judges, takes no videos"

    return unfit


def _checkpoints(feedback: Feedback, models: Models) -> list[tuple[str, str]]:
    """(name, template) of the checkpoints that are shown prompts; a reward model looks at them
    itself, see `RewardModelJudge.check`."""
    if isinstance(feedback, ImplicitFeedback):
        return [(name, models.template) for name in (feedback.policy, feedback.reference)]
    asked = getattr(feedback, "labeler", None)
    return [models.name(asked)] if isinstance(asked, CheckpointAsked) else []


def make_splitter(
    splitting: PictureWorldSplitting | WholeSplitting | ChatSplitting | CheckpointSplitting,
    models: Models,
) -> tuple[Splitter, list[Callable[[], Any]]]:
    """The splitter of a section, and the checks of what it needs."""
    if isinstance(splitting, PictureWorldSplitting):
        return PictureWorldSplitter(splitting.whole), []
    if isinstance(splitting, WholeSplitting):
        return WholeSplitter(splitting.prompt), []
    model, key, check = text_model(splitting, splitting, models)
    if splitting.style == "json":
        return ModelSplitter(model, splitting, key), [check]
    if splitting.question_model is None:
        return RlaifVSplitter(model, model, splitting, [key, key]), [check]
    asked = splitting.model_copy(update={"model": splitting.question_model})
    questions, second_key, second_check = text_model(asked, splitting, models)
    splitter = RlaifVSplitter(model, questions, splitting, [key, second_key])
    return splitter, [check, second_check]


def text_model(
    asked: CheckpointAsked | ChatAsked, speaking: Speaking, models: Models
) -> tuple[TextModel, Any, Callable[[], Any]]:
    """(model of a section, all that its replies depend on as JSON, a check that it is there)."""
    if isinstance(asked, ChatAsked):
        client = models.servers.client(asked)
        served = ServedTextModel(client, speaking, models.seed)
        return served, [client.server.identity(), models.seed], client.check
    load = functools.partial(models.load, asked)
    model = CheckpointTextModel(load, models.mesh, asked, speaking, models.seed)
    check = functools.partial(load_processor, *models.name(asked))
    return model, [models.fingerprint(asked), models.seed], check


def make_labeler(
    labeling: CheckpointLabeling | ChatLabeling, models: Models
) -> tuple[Callable[[], Labeler], str, Callable[[], None]]:
    """(a function that makes the labeler, fingerprint of all that its answers depend on, a check
    of what can be known to be wrong with it)."""
    if isinstance(labeling, ChatLabeling):
        client = models.servers.client(labeling)
        options = labeling.model_dump(mode="json", include={"read", "samples", "attempts"})
        key = fingerprint_json([CHAT_LABEL_RULES, client.server.identity(), options])
        return functools.partial(ChatLabeler, client, labeling), key, client.check

    def load() -> Labeler:
        checkpoint = models.load(labeling)
        size = labeling.batch_size
        return CheckpointLabeler(checkpoint, models.mesh, None, batch_size=size)

    def check() -> None:
        answer_tokens(load_processor(*models.name(labeling)))

    return load, models.fingerprint(labeling), check
