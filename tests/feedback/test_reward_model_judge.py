"""A reward model as a judge: the numbers of `mmpo reward`, behind critiques of its own."""

import dataclasses
import json

import pytest
from helpers.judged import responses_of
from helpers.reward_heads import save_headed

from mmpo_jax.checkpoints.checkpoint import open_reward_model
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.records import Response, VideoRef
from mmpo_jax.feedback.judges import make_judge
from mmpo_jax.feedback.models import Models
from mmpo_jax.feedback.served import Servers
from mmpo_jax.recipes.feedback import RewardModelFeedback
from mmpo_jax.reward_models.reading import Reading
from mmpo_jax.reward_models.scoring import score_responses

TEXTS = {"p": ["yes", "a red star", ""], "q": ["a ring", "two blue rings"]}
ASK = "is it there ?"


@pytest.fixture(scope="module")
def critic(tiny_folder, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic") / "model"
    return save_headed(folder, tiny_folder, *tiny_model, critique_prompt=ASK)


@pytest.fixture
def judge_of(tiny_folder, mesh, tmp_path):
    def judge_of(model, **options):
        models = Models(mesh, "auto", Servers(str(tmp_path)), str(tiny_folder), "auto", 5)
        judge = make_judge(RewardModelFeedback(model=str(model), **options), models)
        judge.check([])
        return judge

    return judge_of


@pytest.mark.parametrize("options", [{}, {"critiques": 2}, {"critiques": 0}])
def test_equals_what_the_model_says(judge_of, critic, mesh, tmp_path, options):
    options |= {"max_new_tokens": 6}
    responses = responses_of(tmp_path / "round-1", TEXTS)
    judged = judge_of(critic, **options).judge(responses)
    rows = judged.table.to_pylist()
    feedback = RewardModelFeedback(model=str(critic), **options)
    opened = open_reward_model(str(critic))
    records = [
        dataclasses.replace(record, responses=tuple(map(Response.of, TEXTS[record.id])))
        for record in responses.records
    ]
    found = score_responses(
        opened.reloaded(mesh),
        records,
        Reading.of(feedback, opened.model, "critic"),
        feedback,
        None,
        mesh,
        folder=None,
        seed=5,
    )
    rewards = [reward for one in found for reward in one.rewards]
    assert [row["score"] for row in rows] == pytest.approx(rewards, abs=1e-6)
    assert len(set(rewards)) == 5
    details = [json.loads(row["details"]) for row in rows]
    critiques = [own for one in found for own in one.critiques]
    assert [said.get("critiques", []) for said in details] == critiques
    count = options.get("critiques", 1)
    assert all(len(own) == count for own in critiques)
    again = judge_of(critic, **options).judge(responses)  # finished, and read
    assert again.fingerprint == judged.fingerprint


def test_refusals(judge_of, critic, tiny_folder, tiny_model, tmp_path):
    with pytest.raises(MmpoError, match="has no reward head, so it scores nothing"):
        judge_of(tiny_folder)
    scalar = save_headed(tmp_path / "scalar", tiny_folder, *tiny_model)
    with pytest.raises(MmpoError, match="was trained to score responses without critiques"):
        judge_of(scalar, critiques=1)
    judge = judge_of(critic)
    picture = responses_of(tmp_path / "round-2", TEXTS).records[0]
    judge.check([picture])
    video = dataclasses.replace(picture, videos=(VideoRef("v", picture.images),))
    with pytest.raises(MmpoError, match=r"prompt 'p': .*critic.*: this model takes no videos"):
        judge.check([picture, video])
    with pytest.raises(ValueError, match="given_critiques: of sampled responses nobody"):
        RewardModelFeedback(model="m", given_critiques=True)
