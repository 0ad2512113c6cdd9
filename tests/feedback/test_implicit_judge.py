"""DPO's own reward as a judge: the numbers of `mmpo select`, and responses it cannot take."""

import json
import shutil

import numpy as np
import pytest
from helpers import tiny
from helpers.judged import responses_of

from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.records import Response
from mmpo_jax.data.tokenization import UNLIMITED
from mmpo_jax.feedback.implicit import reward_records, tokenizer_for_both
from mmpo_jax.feedback.implicit_judge import ImplicitJudge
from mmpo_jax.feedback.models import Models
from mmpo_jax.feedback.served import Servers
from mmpo_jax.picture_world.processor import TOKENS
from mmpo_jax.recipes.feedback import ImplicitFeedback

TEXTS = {"p": ["yes", "a red star", "no"], "q": ["a ring", "two blue rings"]}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder with other weights."""
    return tiny.make_folder(tmp_path_factory.mktemp("other") / "llava", seed=1)


@pytest.fixture
def judge_of(tiny_folder, other, mesh, tmp_path):
    """Makes judges, where responses are sampled by the checkpoint `held`."""

    def judge_of(held=None, policy=tiny_folder, reference=other, **options):
        options = {"policy": str(policy), "reference": str(reference), "beta": 0.5, **options}
        models = Models(mesh, "auto", Servers(str(tmp_path)), str(tiny_folder), "auto", 0)
        if held is not None:
            models.held = load_checkpoint(str(held), mesh)
        judge = ImplicitJudge(ImplicitFeedback(**options), models)
        judge.check([])
        return judge

    return judge_of


def ids_of(text):
    return tuple(TOKENS.index(word) for word in text.split())


def expected(tiny_folder, other, mesh, responses, records):
    """What the library's function says of the responses (lists of `Response`) to the records."""
    import dataclasses

    policy, reference = (load_checkpoint(str(name), mesh) for name in (tiny_folder, other))
    both = tokenizer_for_both(reference.processor)
    made = [
        both(
            dataclasses.replace(record, responses=tuple(given)),
            policy.processor,
            UNLIMITED,
            UNLIMITED,
        )
        for record, given in zip(records, responses, strict=True)
    ]
    return reward_records(
        policy, reference, made, mesh, beta=0.5, batch_size=8, compute_dtype="float32"
    )


@pytest.mark.parametrize("per_token", [True, False])
def test_equals_the_rewards_of_select(judge_of, tiny_folder, other, mesh, tmp_path, per_token):
    responses = responses_of(tmp_path / "round-1", TEXTS)
    rows = judge_of(per_token=per_token).judge(responses).table.to_pylist()
    rewards = expected(
        tiny_folder,
        other,
        mesh,
        [map(Response.of, texts) for texts in TEXTS.values()],
        responses.records,
    )
    values = [one for of in rewards for one in (of.per_token if per_token else of.summed)]
    np.testing.assert_allclose([row["score"] for row in rows], values, rtol=1e-5)
    assert len(set(values)) == 5
    details = [json.loads(row["details"]) for row in rows]
    assert [said["num_tokens"] for said in details] == [2, 4, 2, 3, 4]
    sums = [one for of in rewards for one in of.summed]
    np.testing.assert_allclose([said["summed"] for said in details], sums, rtol=1e-5)


def test_sampled_ids_count_where_the_generator_has_these_tokens(
    judge_of, tiny_folder, other, mesh, tmp_path
):
    """The ids say something else than the text, so that one sees which were taken."""
    sampled = {(name, n): ids_of("the ring") for name in TEXTS for n in range(3)}
    responses = responses_of(tmp_path / "same", TEXTS, sampled)
    rows = judge_of(tiny_folder).judge(responses).table.to_pylist()
    by_ids = [[Response.of(t, token_ids=ids_of("the ring")) for t in x] for x in TEXTS.values()]
    rewards = expected(tiny_folder, other, mesh, by_ids, responses.records)
    values = [one for of in rewards for one in of.per_token]
    np.testing.assert_allclose([row["score"] for row in rows], values, rtol=1e-5)


def test_another_tokenizer_of_the_generator_means_texts(
    judge_of, tiny_folder, other, mesh, tmp_path
):
    generator = tiny.make_byte_level_folder(tmp_path / "bytes")
    sampled = {(name, n): ids_of("the ring") for name in TEXTS for n in range(3)}
    responses = responses_of(tmp_path / "round-1", TEXTS, sampled)
    rows = judge_of(generator).judge(responses).table.to_pylist()
    texts = [map(Response.of, of_prompt) for of_prompt in TEXTS.values()]
    rewards = expected(tiny_folder, other, mesh, texts, responses.records)
    values = [one for of in rewards for one in of.per_token]
    np.testing.assert_allclose([row["score"] for row in rows], values, rtol=1e-5)


def test_a_response_that_cannot_be_taken_has_a_reason_and_its_siblings_scores(
    judge_of, tiny_folder, tmp_path
):
    texts = {"p": ["yes", "", "no"], "q": ["", ""]}
    responses = responses_of(tmp_path / "round-1", texts, finished=False)
    rows = judge_of().judge(responses).table.to_pylist()
    assert [row["reason"] for row in rows] == [
        None,
        "empty_response",
        None,
        "empty_response",
        "empty_response",
    ]
    assert [np.isnan(row["score"]) for row in rows] == [False, True, False, True, True]
    assert "problem" in json.loads(rows[1]["details"])
    alone = responses_of(tmp_path / "alone", {"p": ["yes", "no"]}, finished=False)
    others = judge_of().judge(alone).table["score"].to_pylist()
    np.testing.assert_allclose([rows[0]["score"], rows[2]["score"]], others, rtol=1e-5)


def test_none_that_can_be_taken(judge_of, tmp_path):
    responses = responses_of(tmp_path / "round-1", {"p": ["", ""]}, finished=False)
    rows = judge_of().judge(responses).table.to_pylist()
    assert [row["reason"] for row in rows] == ["empty_response"] * 2


def test_policy_and_reference_of_other_tokenizers_are_refused_before_anything(judge_of, tmp_path):
    with pytest.raises(MmpoError, match="policy and reference have other tokenizers"):
        judge_of(reference=tiny.make_byte_level_folder(tmp_path / "bytes"))


def test_a_finished_stage_is_read(judge_of, tmp_path, monkeypatch):
    responses = responses_of(tmp_path / "round-1", TEXTS)
    first = judge_of().judge(responses)
    monkeypatch.setattr(ImplicitJudge, "_rewards", None)
    shutil.rmtree(tmp_path / "round-1" / "implicit", ignore_errors=True)
    assert judge_of().judge(responses).fingerprint == first.fingerprint
