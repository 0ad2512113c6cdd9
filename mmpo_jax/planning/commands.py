"""What the commands that run a recipe run, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.generation.responses import PROMPTS_PER_PART
from mmpo_jax.planning.abstract import Sizes
from mmpo_jax.planning.judging import in_inference, judge_stages
from mmpo_jax.planning.opened import Opened
from mmpo_jax.planning.programs import validation
from mmpo_jax.planning.rewarding import reward_stages
from mmpo_jax.planning.sampling import Sampled
from mmpo_jax.planning.stages import Assumed, Plan, Stages
from mmpo_jax.planning.teaching import Teaching
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.base import Base
from mmpo_jax.recipes.candidates import (
    CheckpointCandidates,
    EditedImageCandidates,
    GreedyCandidates,
    PolicyCandidates,
)
from mmpo_jax.recipes.command_recipes import GenerateRecipe, RewardRecipe, ScoreRecipe, SelectRecipe
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.recipes.teacher import SelfTeacher
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.on_policy import with_token_limit
from mmpo_jax.training.plan import micro_batch_size, total_steps, trained_config


def plan_stages(recipe: Base, mesh: Mesh, assumed: Assumed) -> Plan:
    """All programs that a recipe runs on a mesh, and how often.

    Args:
      recipe: of any command that runs one.
      mesh: the devices.
      assumed: what it does not say.

    Raises:
      MmpoError: the recipe cannot be run on the mesh, or there is nothing to plan.
    """
    kinds: dict[type, Callable[[Stages, Any], None]] = {
        TrainRecipe: _train,
        AlignRecipe: _align,
        GenerateRecipe: _generate,
        ScoreRecipe: _score,
        RewardRecipe: _reward,
        SelectRecipe: _select,
    }
    stages = Stages(recipe, mesh, assumed)
    kinds[type(recipe)](stages, recipe)
    return stages.plan()


def _train(stages: Stages, recipe: TrainRecipe) -> None:
    opened = stages.open(recipe.model, recipe.template)
    opened = opened.with_config(
        trained_config(recipe.training, recipe.reward_head, opened.model.config)
    )
    rows = [stages.rows(data) for data in recipe.data]
    parts = [
        MixtureEntry(count, data.weight)
        for count, data in zip(rows, recipe.data, strict=True)
        if count is not None
    ]
    config, rollout = recipe.training, recipe.rollout
    if rollout is not None:
        config = with_token_limit(config, rollout)
    known = len(parts) == len(rows)
    steps = total_steps(config, parts, rollout) if known else config.max_steps
    records = sum(part.size for part in parts) if known else None
    responses = stages.assumed.responses if rollout is None else rollout.num_samples
    sizes = stages.sizes(opened, recipe.lengths, responses)
    if rollout is not None:
        draws = None if steps is None else steps / rollout.steps
        _rollouts(stages, rollout, opened, config, sizes, draws)
    teaching = _teaching(stages, recipe, opened, responses)
    stages.training(opened, config, sizes, steps, records, rollout, teaching)
    if recipe.validation is not None:
        held = recipe.validation.share
        batches = None
        if held is not None and records is not None and steps is not None:
            times = steps // recipe.validation.every + 2
            batches = times * math.ceil(held * records / config.batch_size)
        program = validation(opened, stages.mesh, config, sizes)
        stages.add("validation", [program], [batches])


def _teaching(
    stages: Stages, recipe: TrainRecipe, opened: Opened, responses: int
) -> Teaching | None:
    """The recipe's teacher, shown so many responses to a prompt."""
    asked = recipe.training.teacher
    if asked is None:
        return None
    own = isinstance(asked, SelfTeacher)
    teacher = opened
    if not isinstance(asked, SelfTeacher):
        teacher = stages.open(asked.model, asked.template)
    lengths, key = recipe.lengths, "lengths.prompt"
    if asked.prompt_lengths is not None:
        lengths = lengths.model_copy(update={"prompt": asked.prompt_lengths})
        key = "training.teacher.prompt_lengths"
    if asked.image == "data":
        stages.notes.append("training.teacher: the other image that it sees is as large as the own")
    sizes = stages.sizes(teacher, lengths, responses, key=key)
    return Teaching(teacher.with_dtype(recipe.training.compute_dtype), sizes, own)


def _rollouts(
    stages: Stages,
    rollout: Rollout,
    opened: Opened,
    config: Training,
    sizes: Sizes,
    draws: float | None,
) -> None:
    """Sampling, log-probs of samples and rewards, of so many rollouts or an unknown number."""
    prompts = config.batch_size * rollout.minibatches
    total = None if draws is None else draws * prompts
    decoding = Decoding(**rollout.model_dump(include=set(Decoding.model_fields)))
    policy = opened.with_dtype(config.compute_dtype).quantized(config.quantization)
    sampled = Sampled(prompts, config.batch_size, decoding)
    stages.sample("rollouts", policy, sizes, sampled, prompts, draws)
    if rollout.dynamic_sampling is not None:
        stages.notes.append("rollout.dynamic_sampling: every prompt teaches, and none is replaced")
    passes = int(rollout.needs_old) + int(rollout.reward_kl > 0)  # under the reference too
    if passes:
        rows = micro_batch_size(config, stages.mesh)
        read = None if total is None else passes * total
        stages.scored("rollouts", policy, sizes, rows, config.compute_dtype, read)
    for asked in rollout.reward_models:
        stages.notes.append(
            f"the weights of the policy and of {asked.model} are not counted beside each other"
        )
        reward_stages(
            stages,
            "rewards",
            asked.model,
            asked.template,
            asked,
            None,
            rollout.num_samples,
            total,
        )


def _align(stages: Stages, recipe: AlignRecipe) -> None:
    start = stages.open(recipe.model, recipe.template)
    opened = trained = start
    if recipe.rounds > 1 and start.dtype.name != "float32":
        opened = start.with_dtype("float32")
        do = "sample"
        if recipe.training.quantization is None:  # else all are trained on the start's own integers
            trained, do = opened, "start"
        stages.notes.append(
            f"rounds after the first {do} from float32 weights, as all do in the plan; the first "
            f"has {start.dtype.name}"
        )
    speaking, asked = (in_inference(recipe, each) for each in (opened, start))
    rounds = recipe.rounds
    prompts = recipe.prompts_per_round
    if prompts is None:
        prompts = stages.rows(recipe.data)
    sizes = stages.sizes(opened, recipe.lengths, 2)
    with stages.on(recipe.inference_devices):
        responses = _candidates(stages, recipe, speaking, prompts)
        judge_stages(stages, recipe, asked, prompts, responses)
    pairs = None if prompts is None else prompts * recipe.pairing.max_pairs_per_prompt
    config = recipe.training
    steps = None if pairs is None else total_steps(config, [MixtureEntry(pairs)])
    if steps is None:
        steps = config.max_steps
    if pairs is not None:
        stages.notes.append(
            f"every prompt has {recipe.pairing.max_pairs_per_prompt} pairs, as many as allowed"
        )
    total = None if steps is None else steps * rounds
    stages.training(trained, config, sizes, total, None if pairs is None else pairs * rounds)


def _candidates(stages: Stages, recipe: AlignRecipe, opened: Opened, prompts: int | None) -> float:
    """Adds the sampling of all sources; how many responses a prompt has."""
    sizes = stages.sizes(opened, recipe.lengths, 2)
    responses = 0.0
    for source in recipe.candidates:
        if not isinstance(
            source,
            PolicyCandidates | GreedyCandidates | EditedImageCandidates | CheckpointCandidates,
        ):
            stages.notes.append(f"candidates: {source.name} takes no program of ours")
            continue
        drawn = source.drawn(recipe.sampling)
        own = opened
        if isinstance(source, CheckpointCandidates):
            own = in_inference(recipe, stages.open(source.model, source.template))
        responses += drawn.num_samples
        sampled = Sampled(PROMPTS_PER_PART, drawn.batch_size, drawn)
        name = "generation" if isinstance(source, PolicyCandidates) else source.name
        stages.sample(name, own, sizes, sampled, prompts, recipe.rounds)
    return responses


def _generate(stages: Stages, recipe: GenerateRecipe) -> None:
    opened = stages.open(recipe.model, recipe.template)
    sizes = stages.sizes(opened, recipe.lengths, 0, recipe.sampling.max_new_tokens)
    sampled = Sampled(PROMPTS_PER_PART, recipe.sampling.batch_size, recipe.sampling)
    stages.sample("generation", opened, sizes, sampled, stages.rows(recipe.data), 1)


def _score(stages: Stages, recipe: ScoreRecipe) -> None:
    opened = stages.open(recipe.model, recipe.template)
    sizes = stages.sizes(opened, recipe.lengths, stages.assumed.responses)
    stages.scored(
        "scoring",
        opened,
        sizes,
        recipe.scoring.batch_size,
        recipe.scoring.compute_dtype,
        stages.rows(recipe.data),
    )


def _reward(stages: Stages, recipe: RewardRecipe) -> None:
    reward_stages(
        stages,
        "rewards",
        recipe.model,
        recipe.template,
        recipe.rewarding,
        recipe.lengths,
        stages.assumed.responses,
        stages.rows(recipe.data),
    )


def _select(stages: Stages, recipe: SelectRecipe) -> None:
    opened = stages.open(recipe.model, recipe.template)
    rows, responses = stages.rows(recipe.data), stages.assumed.responses
    if recipe.sampling is not None:
        responses = recipe.sampling.num_samples
        limit = recipe.sampling.max_new_tokens
        sizes = stages.sizes(opened, recipe.lengths, responses, limit)
        sampled = Sampled(PROMPTS_PER_PART, recipe.batch_size, recipe.sampling)
        stages.sample("generation", opened, sizes, sampled, rows, 1)
    asked = recipe.reward_model
    if asked is not None:
        lengths = None if recipe.sampling is not None else recipe.lengths
        reward_stages(
            stages, "rewards", asked.model, asked.template, asked, lengths, responses, rows
        )
    if recipe.reference is None:
        return
    for name in (recipe.model, recipe.reference):
        scored = stages.open(name, recipe.template)
        sizes = stages.sizes(scored, recipe.lengths, responses)
        stages.scored(
            "scoring", scored, sizes, recipe.batch_size, recipe.reward.compute_dtype, rows
        )
