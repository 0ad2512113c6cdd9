"""Reward models for the tests: tiny checkpoints under a head with large random weights."""

import dataclasses
import json

import numpy as np

from mmpo_jax.checkpoints.huggingface import save_model
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.critiques import tokenize_scored
from mmpo_jax.models.config import RewardHead
from mmpo_jax.models.model import Model
from mmpo_jax.models.reward_head import is_reward_head
from mmpo_jax.objectives.registry import Scored

KINDS = ("linear", "two_layer")


def headed(model, params, kind="linear", critique_prompt=None, layout="turns", seed=0):
    """(model, parameters) with a random head on top."""
    head = RewardHead(kind, critique_prompt, layout)
    config = dataclasses.replace(model.config, reward_head=head)
    model = Model.create(config, model.attention)
    rng = np.random.default_rng(seed)
    flat = dict(flatten(params))
    for path, leaf in flatten(model.abstract_params()).items():
        if is_reward_head(path):
            flat[path] = (2 * rng.standard_normal(leaf.shape) / leaf.shape[0] ** 0.5).astype("f")
    return model, unflatten(flat)


def save_headed(folder, source, model, params, **options):
    """The folder of a reward model whose files beside the weights are those of `source`."""
    save_model(folder, *headed(model, params, **options), source)
    return folder


def scored_batch(records, processor, scored=Scored(), rows=None):  # noqa: B008
    """(tokenized records, their padded batch)."""
    limit = 2**20
    tokenized = [tokenize_scored(r, processor, limit, limit, scored=scored) for r in records]
    longest = max(len(r.ids) for row in tokenized for r in row.responses)
    batch = pad_batch(
        tokenized,
        processor,
        rows=rows or len(tokenized),
        prompt_sizes=(max(len(row.prompt_ids) for row in tokenized) + 3,),
        response_sizes=(longest + 2,),
    )
    return tokenized, batch


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
