"""Small runs that learn from what they sample: prompts, what sampling reads, and easy rewards."""

import contextlib
import dataclasses

import numpy as np
import pytest
from helpers.loop_runs import make_start

from mmpo_jax.core.trees import flatten
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.recipes.rewards import RewardSection
from mmpo_jax.rewards.registry import Value
from mmpo_jax.training.batches import TrainingData
from mmpo_jax.training.loop import Run, train
from mmpo_jax.training.on_policy import with_token_limit


@dataclasses.dataclass
class State:
    """What a rollout reads of a train state, from trees."""

    tree: dict
    step: int = 0
    frozen: dict = dataclasses.field(default_factory=dict)
    moved: dict = dataclasses.field(default_factory=dict)
    """The reference's."""

    @property
    def params(self):
        return flatten(self.tree)

    @property
    def reference(self):
        return flatten(self.moved)


def tokenized_prompts(processor, lengths, given=None, **options):
    """Prompts as tokens; of the first six scenes where none are given."""
    given = prompt_records("align", 0, 6, 24) if given is None else given
    kept, skipped = tokenize_records(given, processor, lengths, **options)
    assert not skipped
    return kept


@contextlib.contextmanager
def easy_rewards():
    """Random weights never say what a real reward looks for: here letters are counted, and for
    anything but captions the length."""

    def values(self, question, texts, tokens=()):
        if self.type == "picture_world_caption":
            return [Value(text.count("a") - text.count("e")) for text in texts]
        return [Value(len(text) % 3) for text in texts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardSection, "values", values)
        yield


def trained(folder, model, processor, examples, config, rollout, lengths, mesh):
    """The parameters by path after a run from a (model, parameters) in a folder."""
    params = train(
        make_start(model, processor),
        TrainingData(examples, rollout=rollout),
        with_token_limit(config, rollout),
        lengths,
        mesh,
        Run(str(folder), {}, 0),
    ).params
    return {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
