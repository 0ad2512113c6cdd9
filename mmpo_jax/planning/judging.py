"""What the judge of a round runs: splitters, labelers, and whoever else gives responses scores."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mmpo_jax.data.batching import fitting_sizes
from mmpo_jax.data.pair_questions import PAIR_PROMPT
from mmpo_jax.feedback import self_reward, split_prompts
from mmpo_jax.feedback.labeler import QUESTIONS_AT_ONCE, USUAL_QUESTIONS
from mmpo_jax.generation.responses import PROMPTS_PER_PART
from mmpo_jax.planning.abstract import Sizes
from mmpo_jax.planning.opened import Opened
from mmpo_jax.planning.programs import labelling, scoring
from mmpo_jax.planning.rewarding import reward_stages
from mmpo_jax.planning.sampling import Sampled
from mmpo_jax.planning.stages import TEXT_TOKENS, Stages
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.feedback import (
    CheckpointAsked,
    CheckpointLabeling,
    CheckpointSplitting,
    ClaimsFeedback,
    ImplicitFeedback,
    PairFeedback,
    RewardModelFeedback,
    SelfRewardFeedback,
)
from mmpo_jax.recipes.sampling import Decoding


def judge_stages(
    stages: Stages, recipe: AlignRecipe, opened: Opened, prompts: int | None, responses: float
) -> None:
    """Adds what the judge of a round takes to the stages.

    Args:
      stages: of the recipe.
      recipe: of an alignment.
      opened: what its first round starts from.
      prompts: of a round; None where that is not known.
      responses: of a prompt.
    """
    feedback, rounds = recipe.feedback, recipe.rounds
    count = None if prompts is None else prompts * responses * rounds
    if isinstance(feedback, ImplicitFeedback):
        for name in (feedback.policy, feedback.reference):
            scored = stages.open(name, recipe.template)
            dtype = scored.inference_dtype.name
            if feedback.compute_dtype != "auto":
                dtype = feedback.compute_dtype
            rows = stages.rounded(feedback.batch_size)
            sizes = stages.sizes(scored, recipe.lengths, int(responses))
            sizes = dataclasses.replace(sizes, rows=rows)
            program = scoring("implicit reward", scored, stages.mesh, sizes, dtype)
            batches = None if prompts is None else prompts * rounds / rows
            stages.add("judging", [program], [batches])
    elif isinstance(feedback, SelfRewardFeedback | PairFeedback):
        if not isinstance(feedback.labeler, CheckpointAsked):
            stages.notes.append("feedback.labeler is a server, which is not planned")
            return
        labeler = _asked(stages, feedback.labeler, recipe, opened)
        text, answer, asks = _judging(feedback, recipe.sampling.max_new_tokens, responses)
        asked = None if count is None else count * asks
        _speak(stages, "judging", labeler, feedback.labeler, feedback, text, answer, asked)
    elif isinstance(feedback, ClaimsFeedback):
        _split(stages, recipe, feedback, opened, count)
        if not isinstance(feedback.labeler, CheckpointLabeling):
            stages.notes.append("feedback.labeler is a server, which is not planned")
            return
        labeler = _asked(stages, feedback.labeler, recipe, opened)
        _label(stages, feedback.labeler, labeler, prompts, responses, rounds)
    elif isinstance(feedback, RewardModelFeedback):
        scored_rows = None if prompts is None else prompts * rounds
        reward_stages(
            stages,
            "judging",
            feedback.model,
            feedback.template,
            feedback,
            None,
            int(responses),
            scored_rows,
        )
    else:
        stages.notes.append(f"feedback of type {feedback.type} takes no program of ours")


def _judging(
    feedback: SelfRewardFeedback | PairFeedback, answer: int, responses: float
) -> tuple[str, int, float]:
    """(prompt of a judge in words, tokens of answers in it, requests for a response)."""
    if isinstance(feedback, SelfRewardFeedback):
        return feedback.prompt or self_reward.PROMPT, answer, 1
    others = responses - 1 if feedback.opponents is None else feedback.opponents
    return feedback.prompt or PAIR_PROMPT, 2 * answer, max(0, min(others, responses - 1))


def _split(
    stages: Stages,
    recipe: AlignRecipe,
    feedback: ClaimsFeedback,
    opened: Opened,
    count: float | None,
) -> None:
    splitter = feedback.splitter
    if not isinstance(splitter, CheckpointSplitting):
        stages.notes.append(f"feedback.splitter of type {splitter.type} takes no program of ours")
        return
    answer = recipe.sampling.max_new_tokens
    asked = _asked(stages, splitter, recipe, opened)
    if splitter.style == "json":
        text = splitter.prompt or split_prompts.CLAIMS_PROMPT
        _speak(stages, "splitting", asked, splitter, splitter, text, answer, count)
        return
    text = splitter.prompt or split_prompts.FACTS_PROMPT
    _speak(stages, "splitting", asked, splitter, splitter, text, answer, count)
    second = asked
    if splitter.question_model is not None:
        second = in_inference(recipe, stages.open(splitter.question_model, splitter.template))
    text = splitter.question_prompt or split_prompts.QUESTIONS_PROMPT
    facts = round(stages.assumed.claims * stages.assumed.question_tokens)
    _speak(stages, "questions", second, splitter, splitter, text, facts, count)


def _speak(
    stages: Stages,
    stage: str,
    opened: Opened,
    asked: CheckpointAsked,
    speaking: Any,
    text: str,
    told: int,
    count: float | None,
) -> None:
    """A text model that is asked once for every response, with so many tokens of it."""
    processor = opened.processor
    picture = (
        opened if stage == "judging" else dataclasses.replace(opened, picture_tokens=0, slots=0)
    )
    tokens = picture.picture_tokens + len(processor.encode(text)) + TEXT_TOKENS + told
    (prompt,) = fitting_sizes([tokens], 4)
    decoding = Decoding(
        temperature=speaking.temperature,
        top_p=speaking.top_p,
        max_new_tokens=speaking.max_new_tokens,
    )
    sampled = Sampled(PROMPTS_PER_PART * 10, asked.batch_size, decoding)
    sizes = Sizes(1, prompt, slots=picture.slots)
    stages.notes.append("replies of text models are planned as long as their limit, asked once")
    stages.sample(stage, opened, sizes, sampled, count, 1)


def _label(
    stages: Stages,
    labeling: CheckpointLabeling,
    opened: Opened,
    prompts: int | None,
    responses: float,
    rounds: int,
) -> None:
    """RLAIF-V's labeler, with the questions of a prompt's responses behind its image."""
    assumed = stages.assumed
    questions = max(1, math.ceil(responses * assumed.claims))
    at_once = min(questions, QUESTIONS_AT_ONCE)
    (count,) = fitting_sizes([at_once], 2)
    (prompt,) = fitting_sizes([opened.picture_tokens + TEXT_TOKENS], 4)
    (question,) = fitting_sizes([assumed.question_tokens], 2)
    rows = stages.rounded(labeling.batch_size)
    budget = rows * (prompt + min(count, USUAL_QUESTIONS) * question)
    fitting = budget // (prompt + count * question) // stages.shards * stages.shards
    sizes = Sizes(max(stages.shards, fitting), prompt, count, question, opened.slots)
    program = labelling(opened, stages.mesh, sizes)
    stages.notes.append(
        f"a response makes {assumed.claims:g} claims, each asked about by "
        f"{assumed.question_tokens} tokens"
    )
    batches = None
    if prompts is not None:
        parts = math.ceil(questions / at_once)
        batches = rounds * math.ceil(prompts * parts / sizes.rows)
    stages.add("labelling", [program], [batches])


def _asked(stages: Stages, asked: CheckpointAsked, recipe: AlignRecipe, opened: Opened) -> Opened:
    """The checkpoint that a section means; by default the recipe's own in all rounds."""
    if asked.model is None:
        return opened
    return in_inference(recipe, stages.open(asked.model, asked.template))


def in_inference(recipe: AlignRecipe, opened: Opened) -> Opened:
    """A checkpoint as rounds run it without training it."""
    return opened if recipe.inference_dtype is None else opened.with_dtype(recipe.inference_dtype)
