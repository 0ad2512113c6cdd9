"""GRPO by a reward model: what rollouts are worth is what it says of their texts."""

import dataclasses

import numpy as np
import pytest
from helpers.loop_runs import make_start
from helpers.reward_heads import save_headed, write_jsonl
from helpers.rollouts import State

from mmpo_jax.checkpoints.checkpoint import open_reward_model
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.data.records import IMAGE, Record, Response, Turn
from mmpo_jax.data.row_stage import tokenized_rows
from mmpo_jax.data.sources import LearnedFile
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.training import Training
from mmpo_jax.reward_models.reading import Reading
from mmpo_jax.reward_models.scoring import score_responses
from mmpo_jax.training.on_policy import Prompts, Rollouts
from mmpo_jax.training.row_use import PromptUse

LENGTHS = Lengths(prompt=(24,), response=(8,))
CONFIG = Training(
    objective={"type": "grpo"}, reference={"type": "none"}, batch_size=4, micro_batch_size=4
)


@pytest.fixture
def rollout(tiny_folder, tiny_model, tmp_path):
    folder = save_headed(tmp_path / "critic", tiny_folder, *tiny_model, critique_prompt="is it ?")
    model = {"type": "reward_model", "model": str(folder), "max_new_tokens": 5, "weight": 0.5}
    rewards = [{"type": "think_format"}, model]
    return Rollout(rewards=rewards, num_samples=3, max_new_tokens=6)


def dialogues():
    """Prompts of one turn and of several, with the picture in the first or behind a text."""
    for number, record in enumerate(prompt_records("align", 0, 4, 24)):
        (asked,) = record.prompt
        shown = Turn("user", ("a star ?", IMAGE)) if number == 2 else Turn("user", "a star ?")
        earlier = (shown, Turn("assistant", "yes")) if number else ()
        yield dataclasses.replace(record, prompt=(*earlier, asked))


@pytest.mark.slow
def test_samples_are_worth_what_the_model_says(tiny_model, tiny_processor, rollout, mesh):
    """After the whole prompt, whatever turns it has."""
    given = [*dialogues()]
    use = PromptUse.of(rollout)
    records, _ = tokenize_records(given, tiny_processor, LENGTHS, function=use.tokenize)
    assert [use.unfit(record) for record in records] == [None] * 4
    start = make_start(tiny_model, tiny_processor)
    rollouts = Rollouts(
        start, Prompts(records, [MixtureEntry(4)], 3), CONFIG, rollout, LENGTHS, mesh, 4
    )
    seen = {}
    sample = rollouts._sample

    def noting(*arguments):
        seen["found"] = sample(*arguments)
        return seen["found"]

    rollouts._sample = noting
    host = rollouts.draw(State(tiny_model[1]))
    (asked,) = rollout.reward_models
    by_id = {record.id: record for record in given}
    assert sorted(len(by_id[one.record.id].prompt) for one in seen["found"]) == [1, 3, 3, 3]
    opened = open_reward_model(asked.model)
    checkpoint = opened.reloaded(mesh)
    for one in seen["found"]:
        prompt = by_id[one.record.id].prompt
        texts = tuple(Response.of(r.source.text) for r in one.record.responses)
        record = Record(one.record.id, one.record.images, prompt, texts)
        reading = Reading.of(asked, opened.model, "critic")
        (wanted,) = score_responses(
            checkpoint, [record], reading, asked, None, mesh, folder=None, seed=3
        )
        assert one.rewards.shape == (3, 2)
        np.testing.assert_allclose(one.rewards[:, 1], wanted.rewards, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(one.rewards[:, 0], 0)
    mean = np.mean([0.5 * one.rewards[:, 1] for one in seen["found"]])
    assert host.metrics["reward"] == pytest.approx(mean, abs=1e-5)
    assert "rewards/reward_model/mean" in host.metrics


def test_whole_prompts_are_kept_on_disk(rollout, tiny_processor, tmp_path):
    """Turns, places of media and what else a template may read, to the letter."""
    (tmp_path / "a.png").write_bytes(png_bytes(sample_scene("test", 0, 0), 24))
    parts = [{"type": "text", "text": "a  star"}, {"type": "image"}, {"type": "text", "text": "?"}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "yes", "name": "b"},
        {"role": "user", "content": "a ring ?"},
    ]
    rows = [{"id": "a", "images": ["a.png"], "prompt": turns, "chat_template_kwargs": {"x": [1]}}]
    rows += [{"id": "b", "images": ["a.png"], "prompt": "<image>\na star ?"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    use = PromptUse.of(rollout)
    options = {"folder": str(tmp_path / "out"), "name": "rows", "workers": 1}
    files = {"skipped_file": str(tmp_path / "skipped.jsonl")}
    data = LearnedFile(path=str(path))
    lengths = Lengths(prompt=(48,), response=(8,))
    found = tokenized_rows(data, use, tiny_processor, lengths, **options, **files)
    for row, record in zip(found, data.load(supervised=False).records, strict=True):
        told = dataclasses.replace(record, prompt=row.asked.prompt)
        again = use.tokenize(told, tiny_processor, 48, 8)
        assert row.asked.prompt == record.prompt and row.asked.template == record.template
        np.testing.assert_array_equal(again.prompt_ids, row.prompt_ids)
        assert row.asked.images == row.images
