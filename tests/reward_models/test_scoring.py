"""What one response that cannot be read does to those beside it: nothing. No model runs here; a
reward is the number of tokens that are read."""

import dataclasses
import types

import numpy as np
import pytest
from helpers.reward_heads import headed

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import Record, Response, Turn
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.usable import rejections, taken
from mmpo_jax.recipes.scoring import Rewarding
from mmpo_jax.reward_models import critiques, scoring
from mmpo_jax.reward_models.reading import Reading
from mmpo_jax.reward_models.scoring import score_responses

ASK = "is the star there ?"
LONG = "there is a red star and a blue ring and a green star and a ring"
BAD = "a \U0010f000 star"
"""Has a character that no text may have."""
LENGTHS = Lengths(prompt=(24,), response=(16,))


def record(*texts, **fields):
    responses = tuple(
        Response.of(text, **{name: values[place] for name, values in fields.items()})
        for place, text in enumerate(texts)
    )
    return Record("p", (), (Turn("user", "what is in the picture ?"),), responses)


@pytest.fixture
def score(request, tiny_model, tiny_processor, monkeypatch):
    """What is said of a record's responses."""
    prompt, layout = getattr(request, "param", (ASK, "turns"))
    model, _ = headed(*tiny_model, critique_prompt=prompt, layout=layout)
    checkpoint = types.SimpleNamespace(model=model, processor=tiny_processor)
    sampled = {}

    def counted(checkpoint, rows, *_):
        assert all(row.responses for row in rows)
        return [[float(len(one.ids)) for one in row.responses] for row in rows]

    def of_kind(critic, asked, *_):
        sampled["rows"] = [one.row for one in asked]
        count = critic.decoding.num_samples
        said = [f"{'red ' * (k + 1)}star" for k in range(count)]
        return [dict.fromkeys(one.names, said) for one in asked]

    monkeypatch.setattr(scoring, "_rewards", counted)
    monkeypatch.setattr(critiques, "_of_kind", of_kind)

    def score(given, lengths=LENGTHS, **options):
        rewarding = Rewarding(**options)
        reading = Reading.of(rewarding, model, "critic")
        arguments = checkpoint, [given], reading, rewarding, lengths, None
        (found,) = score_responses(*arguments, folder=None, seed=0)
        return found

    score.sampled = sampled
    return score


def reasons(found):
    return [problem and problem[0] for problem in found.problems]


def test_a_critique_that_is_too_long_fails_its_response_alone(score):
    found = score(record("yes", "no", critique=["a star", LONG]), given_critiques=True)
    assert reasons(found) == [None, "response_too_long"]
    assert "the limit is 16" in found.problems[1][1]
    assert found.rewards[0] > 0 and np.isnan(found.rewards[1]) and np.isnan(found.std[1])
    alone = score(record("yes", critique=["a star"]), given_critiques=True)
    assert alone.rewards[0] == found.rewards[0]


def test_one_of_several_critiques_that_is_too_long(score):
    """A mean over the others would be another number."""
    whole = score(record("yes", "a red star"), lengths=None, critiques=8)
    assert reasons(whole) == [None, None] and whole.std.min() > 0
    longest = score(record("yes", critique=["red " * 8 + "star"]), None, given_critiques=True)
    lengths = Lengths(prompt=(24,), response=(int(longest.rewards[0]),))
    found = score(record("yes", "a red star"), lengths, critiques=8)
    assert reasons(found) == [None, "response_too_long"]
    assert found.rewards[0] == whole.rewards[0] and np.isnan(found.rewards[1])
    assert [len(own) for own in found.critiques] == [8, 8]


WITHIN = ("is {response} there ? {question}", "one_turn")


@pytest.mark.parametrize("score", [WITHIN], indirect=True)
def test_responses_within_the_prompt(score):
    """Critiques are answers to a prompt of each response's own, which all of them share."""
    found = score(record("yes", BAD, "yes", "a ring"), critiques=3)
    assert reasons(found) == [None, "bad_text", None, None]
    asked = score.sampled["rows"]
    assert [len(row.responses) for row in asked] == [0, 0]  # equal responses are one
    assert len({row.id for row in asked}) == 2
    ends = [2 + n for n in range(1, 4)]  # red star, red red star, ... and EOS
    assert found.rewards[0] == found.rewards[2] == found.rewards[3] == np.mean(ends)
    assert found.std[0] == np.std(ends) and np.isnan(found.rewards[1])
    assert [len(own) for own in found.critiques] == [3, 0, 3, 3]
    given = score(record("yes", "no", critique=["a star", LONG]), given_critiques=True)
    assert reasons(given) == [None, "response_too_long"] and given.rewards[0] == 3
    plain = score(record("yes", "a ring"), critiques=0)
    assert plain.rewards.tolist() == [2, 3]


@pytest.mark.parametrize("options", [{}, {"critiques": 0}])
def test_a_text_that_has_no_tokens_fails_alone(score, options):
    """As a sample of GRPO may be; the question for a critique of it cannot be asked either."""
    found = score(record("yes", BAD, "no"), **options)
    assert reasons(found) == [None, "bad_text", None]
    assert np.isnan(found.rewards).tolist() == [False, True, False]
    if not options:
        (row,) = score.sampled["rows"]
        assert len(row.responses) == 2
        assert [len(own) for own in found.critiques] == [1, 0, 1]
    nothing = score(record(BAD), **options)
    assert reasons(nothing) == ["bad_text"] and np.isnan(nothing.rewards).all()


def test_critiques_of_the_data_limit_rows_only_where_they_are_read(tiny_model, tiny_processor):
    model, _ = headed(*tiny_model, critique_prompt=ASK)
    given = record("yes", "no", critique=[LONG, "a star"])
    for options, rejected in (({}, False), ({"critiques": 0}, False), ({}, True)):
        rewarding = Rewarding(**options, given_critiques=rejected)
        reading = Reading.of(rewarding, model, "critic")
        if rejected:
            with pytest.raises(UnusableRow, match="with its critique"):
                reading.tokenize(given, tiny_processor, 24, 16)
        else:
            row = reading.tokenize(given, tiny_processor, 24, 16)
            assert not any(response.criticised for response in row.responses)


def test_a_temperature_where_nothing_is_sampled(tiny_model):
    for options in ({"given_critiques": True}, {"critiques": 0}):
        with pytest.raises(ValueError, match="temperature: no critique is sampled"):
            Rewarding(**options, temperature=0.5)
    scalar, _ = headed(*tiny_model)
    with pytest.raises(MmpoError, match=r"so none is sampled; leave `rewarding.temperature` out"):
        Reading.of(Rewarding(temperature=0.5), scalar, "scalar")


def test_responses_that_work_alone_and_not_together(tiny_processor):
    """Dialogues that share no prompt: nobody knows which of them is wrong."""

    def function(asked):
        if len(asked.responses) > 1:
            raise UnusableRow("dialogues_differ", "no")
        return asked

    pair = record("yes", "no")
    assert rejections(pair, function) == [("dialogues_differ", "no")] * 2
    with pytest.raises(UnusableRow):
        taken(pair, function)


def test_what_is_left_out_keeps_its_place():
    given = dataclasses.replace(record("yes", BAD, "no"), left_out=((1, "bad_message", "7"),))

    def function(asked):
        if BAD in [response.text for response in asked.responses]:
            raise UnusableRow("bad_text", "told")
        return asked

    kept, _ = taken(given, function)
    assert [response.text for response in kept.responses] == ["yes", "no"]
    assert kept.left_out == ((1, "bad_message", "7"), (2, "bad_text", "told"))
