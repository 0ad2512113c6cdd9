"""Verdicts in any spelling."""

import pytest
from helpers.format_rows import QUESTION, assistant, gpt, human, read_one, skip_one, user

from mmpo_jax.data.formats.format import FLAGS

TRUE = [True, 1, 1.0, "true", "True", " TRUE ", "1", "+1", "yes", "good", "Desirable", "chosen"]
TRUE += ["👍", "thumbs_up", "thumbs up", "thumbsup", "thumb-up", "positive"]
FALSE = [False, 0, -1, 0.0, "false", "False", "0", "-1", "no", "bad", "undesirable", "rejected"]
FALSE += ["👎", "thumbs_down", "Thumbs Down", "negative"]


@pytest.mark.parametrize(
    ("value", "expected"), [*((v, True) for v in TRUE), *((v, False) for v in FALSE)]
)
def test_every_spelling_in_every_format(tmp_path, value, expected):
    for row in (
        {"prompt": QUESTION, "completion": "A cat.", "label": value},
        {"messages": [user(), assistant("A cat.")], "label": value},
        {"conversations": [human(QUESTION), gpt("A cat.")], "kto_tag": value},
    ):
        (response,) = read_one(tmp_path, row).responses
        assert response.desirable is expected


@pytest.mark.parametrize("value", ["maybe", 2, 0.5, -2, "", [1], {"a": 1}, "down up", "x" * 900])
def test_anything_else_is_refused_with_the_spellings(tmp_path, value):
    skipped = skip_one(tmp_path, {"prompt": QUESTION, "completion": "A cat.", "label": value})
    assert skipped.reason == "bad_label"
    assert all(spelling in skipped.detail for spelling in FLAGS)
    assert len(skipped.detail) < 500
