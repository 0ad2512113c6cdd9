"""Fields that pairwise objectives need, from records' ranks and scores."""

import numpy as np
import pytest

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.records import SCORE, Record, Response, Turn
from mmpo_jax.data.sources import LearnedFile, RecordSet, with_scores
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse
from mmpo_jax.objectives.terms import make_term, needs
from mmpo_jax.training.examples import make_examples
from mmpo_jax.training.fields import lacks


def record(ranks, scores):
    """A record of responses with these ranks and scores by dimension."""
    ids = np.int32([5, 6])
    responses = tuple(
        TokenizedResponse(
            ids, np.ones(2, bool), 0, Response((Turn("assistant", "a"),), rank=r, scores=s)
        )
        for r, s in zip(ranks, scores, strict=True)
    )
    return TokenizedRecord("r", ids, responses, (), (), ranked=None not in ranks)


def fields_of(row, *names):
    terms = [make_term(name, **options) for name, options in names]
    (example,) = make_examples([row], needs(terms))
    return example.fields


def test_win_rates_are_those_against_every_response_of_the_row():
    row = record([1, 2, 3], [{SCORE: s} for s in (1.5, 0.0, -2.0)])
    fields = fields_of(row, ("sppo", {}))
    scores = np.array([1.5, 0.0, -2.0])
    expected = (1 / (1 + np.exp(-(scores[:, None] - scores)))).mean(axis=1)
    np.testing.assert_allclose(fields["win_rate"], expected, rtol=1e-6)
    assert fields.keys() == {"rank", "win_rate"}
    assert lacks(record([1, 2], [{SCORE: 1.0}, {}]), "win_rate")[0] == "no_score"


def test_modpo_reads_the_dimensions_it_names():
    row = record([2, 1], [{"a": 1.0, "b": 2.0, "c": 0.0}, {"a": 3.0, "b": 4.0, "c": 0.0}])
    fields = fields_of(row, ("modpo", {"dimensions": {"b": 0.2, "a": 0.1}}))
    assert fields.keys() == {"rank", "scores/a", "scores/b"}
    np.testing.assert_array_equal(fields["scores/b"], [2, 4])
    assert lacks(row, "scores/d") == ("no_score", "not every response has a score for 'd'")
    with pytest.raises(DataError, match=r"no row has the field 'scores/d'.*several dimensions"):
        fields_of(row, ("modpo", {"dimensions": {"d": 0.2}}))


def test_which_score_is_meant():
    """The one of that name, or the only one; the data's option says which of several it is."""
    scores = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 0.5}]
    several = record([2, 1], scores)
    assert lacks(several, "score")[0] == "no_score"
    assert lacks(record([1, 2], [{"a": 1.0}, {"b": 1.0}]), "score")[0] == "no_score"
    responses = tuple(response.source for response in several.responses)
    record_set = RecordSet("rows", [Record("r", (), (Turn("user", "?"),), responses)], [], 0.0)

    def chosen(name):
        (row,) = with_scores(record_set, LearnedFile(path="rows", score=name)).records
        return record([2, 1], [response.scores for response in row.responses])

    for name, expected in (("a", [1, 3]), ("b", [2, 0.5])):
        fields = fields_of(
            chosen(name), ("mm_dpo", {}), ("sppo", {}), ("modpo", {"dimensions": {"b": 0.2}})
        )
        np.testing.assert_array_equal(fields["score"], expected)
        assert (np.diff(fields["win_rate"]) > 0) == (np.diff(expected) > 0)
        np.testing.assert_array_equal(fields["scores/b"], [2, 0.5])
    assert lacks(chosen("c"), "score")[0] == "no_score"
    beside = [{"a": 1.0, "log_prob/m": -1.0}, {"a": 2.0, "log_prob/m": -2.0}]
    np.testing.assert_array_equal(fields_of(record([2, 1], beside), ("odpo", {}))["score"], [1, 2])


def test_rows_agree_on_what_the_score_is():
    rows = [record([1, 2], [{name: 1.0}, {name: 2.0}]) for name in ("helpfulness", "faithfulness")]
    wanted = needs([make_term("mm_dpo")])
    assert len(make_examples(rows[:1], wanted)) == 1
    with pytest.raises(DataError, match=r"called faithfulness, helpfulness; the data's option `sc"):
        make_examples(rows, wanted)
    assert len(make_examples(rows, needs([make_term("dpo")]))) == 2


def test_gold_is_the_first_of_the_best_of_three_ranks():
    scores = [{}] * 4
    np.testing.assert_array_equal(
        fields_of(record([2, 1, 3, 1], scores), ("triple_po", {}))["gold"], [0, 1, 0, 0]
    )
    for ranks in ([1, 2, 2, 1], [1, 2, None, 3]):
        assert lacks(record(ranks, scores), "gold")[0] == "incomplete_pair"


def test_consistency_is_a_score_of_that_name():
    row = record([1, 2], [{"consistency": 0.7}, {"consistency": 0.7}])
    np.testing.assert_allclose(fields_of(row, ("cream", {}))["consistency"], [0.7, 0.7])
    assert lacks(record([1, 2], [{"consistency": 0.7}, {}]), "consistency")[0] == "no_score"
