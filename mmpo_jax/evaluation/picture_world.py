"""Hallucination on held-out scenes of the picture world: sampled, greedy, and asked directly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.feedback.labeler import CheckpointLabeler
from mmpo_jax.feedback.scores import accepted
from mmpo_jax.generation.responses import generate_responses
from mmpo_jax.picture_world import records as world_records
from mmpo_jax.picture_world.metrics import caption_metrics
from mmpo_jax.recipes.recipe import Evaluation
from mmpo_jax.recipes.sampling import Decoding

GREEDY, SAMPLED = 0.0, 1.0
"""Temperatures of the two decodings."""

VERSION = 3
"""Version of what the metrics mean and how they are computed: part of the key of saved ones."""


def evaluate_picture_world(
    checkpoint: Checkpoint,
    config: Evaluation,
    lengths: Lengths,
    mesh: Mesh,
) -> dict[str, float]:
    """CHAIR, recall and yes/no accuracy of a model.

    Args:
      checkpoint: its parameters on the mesh.
      config: which scenes, how many seeds.
      lengths: bucket sizes.
      mesh: the devices.

    Returns:
      `sampled/...` (temperature 1, mean over the seeds) and `greedy/...` with the names of
      `picture_world.metrics.caption_metrics`, and those of `yes_no_accuracy`.

    Raises:
      DataError: a prompt or a question does not fit the bucket sizes.
    """
    data = config.data
    world = (data.split, data.seed, data.size)
    scenes = world_records.scenes(*world)
    records, skipped = tokenize_records(
        world_records.prompt_records(*world, data.image_size), checkpoint.processor, lengths
    )
    if skipped:
        raise DataError(f"evaluation: {skipped[0].detail}; give lengths.prompt a larger size")

    def captions(temperature: float, seed: int) -> Mapping[str, float]:
        decoding = Decoding(temperature=temperature, max_new_tokens=config.max_new_tokens)
        with progress.doing("captions", len(records), "scenes", "compiling"):
            generated = generate_responses(
                checkpoint,
                records,
                decoding,
                lengths,
                mesh,
                batch_size=config.batch_size,
                seed=seed,
            )
        return caption_metrics([response.text for response in generated], scenes)

    sampled = [captions(SAMPLED, seed) for seed in config.seeds]
    metrics = {f"sampled/{n}": float(np.mean([s[n] for s in sampled])) for n in sampled[0]}
    metrics |= {f"greedy/{name}": value for name, value in captions(GREEDY, 0).items()}
    if data.questions:
        labeler = CheckpointLabeler(checkpoint, mesh, lengths, batch_size=config.batch_size)
        metrics |= yes_no_accuracy(labeler, config)
    return metrics


def yes_no_accuracy(labeler: CheckpointLabeler, config: Evaluation) -> dict[str, float]:
    """Share of held-out questions whose more likely answer is the true one.

    Returns:
      `yes_no_accuracy` over all questions, and `yes_no/...` for each of `language.QUESTION_KINDS`.
    """
    data = config.data
    records = world_records.prompt_records(data.split, data.seed, data.size, data.image_size)
    asked = [
        world_records.held_out_questions(data.split, data.seed, index, data.questions)
        for index in range(data.size)
    ]
    items = [
        (record.id, record.images, tuple(question.text for question in questions))
        for record, questions in zip(records, asked, strict=True)
    ]
    right: dict[str, list[bool]] = {"yes_no_accuracy": []}
    for answers, questions in zip(labeler.answer(items), asked, strict=True):
        for answer, question in zip(answers, questions, strict=True):
            correct = accepted(answer.p_yes, answer.p_no) == question.answer
            right["yes_no_accuracy"].append(correct)
            right.setdefault(f"yes_no/{question.kind}", []).append(correct)
    return {name: float(np.mean(values)) for name, values in right.items()}
