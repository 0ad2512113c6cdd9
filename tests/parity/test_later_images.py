"""Images in responses against transformers, one dialogue at a time: every family that sees."""

import pytest
from helpers import pictures

pytest.importorskip("torch")
from helpers import checks, families

from mmpo_jax.data.records import IMAGE, Record, Response, Turn

pytestmark = pytest.mark.parity

ANSWERS = (("a red star", "what is this ?", "two"), ("a ring", "and a blue ring ?", "a red star"))


@pytest.mark.parametrize(
    "name", [name for name in families.FAMILIES if families.FAMILIES[name].media]
)
@pytest.mark.parametrize("first", [(), (IMAGE,)], ids=["text-first", "image-first"])
@pytest.mark.slow
def test_logits(family_case, name, first):
    """The image stands at another place in each response; a row beside has none in its own."""
    case = family_case(name)
    images = pictures.refs("odd-size", "grey")[: len(first) + 1]
    responses = tuple(
        Response(
            (
                Turn("assistant", said),
                Turn("user", (asked, IMAGE)),
                Turn("assistant", answer),
            )
        )
        for said, asked, answer in ANSWERS
    )
    later = Record("later", images, (Turn("user", (*first, "what is this ?")),), responses)
    records = [later, families.records(name)[0]]
    tokenized, batch = checks.batch_of(case, records)
    assert batch.shown is not None
    assert [row.shows_later for row in tokenized] == [True, False]
    checks.check_logits(case, records, families.inputs(case))
