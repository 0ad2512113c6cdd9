"""Replies with errors: one JSON object, read strictly."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.core.prompts import fill
from mmpo_jax.correction.corrections import Error
from mmpo_jax.correction.prompts import CORRECT_PROMPT, errors_schema, read_errors
from mmpo_jax.feedback.text_model import UnreadableReply

KINDS = ("object", "count")
REJECTED = "There is a  Dog on the sofa, and two cats."
DOG = {"kind": "object", "wrong": "a dog", "yes": "Is there a cat?", "no": "Is there a dog?"}
CATS = {"kind": "count", "wrong": "two cats", "yes": "Is it one cat?", "no": "Are there two cats?"}


def written(*errors):
    return json.dumps({"errors": list(errors)})


def read(reply):
    return read_errors(reply, REJECTED, KINDS)


def reason(reply):
    with pytest.raises(UnreadableReply) as caught:
        read(reply)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize(
    "form", ["{}", "```json\n{}\n```", "Here it is:\n```\n{}\n```\nDone.", " {}\n"]
)
def test_an_object_also_in_a_fence(form):
    assert read(form.replace("{}", written(DOG, CATS))) == (Error(**DOG), Error(**CATS))


def test_no_error_is_an_answer():
    assert read(written()) == ()


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ("", "no_json"),
        ("There are no errors.", "no_json"),
        (written(DOG)[:-1], "no_json"),
        (f"Errors: {written(DOG)}", "no_json"),
        (json.dumps([DOG]), "no_errors_key"),
        (json.dumps({"errors": DOG}), "no_errors_key"),
        (json.dumps({"errors": [DOG], "note": ""}), "no_errors_key"),
        (written("a dog"), "bad_error"),
        (written({**DOG, "answer": "no"}), "bad_error"),
        (written({name: DOG[name] for name in ("kind", "wrong", "no")}), "bad_error"),
        (written(DOG | {"yes": " "}), "bad_error"),
        (written(DOG | {"yes": 3}), "bad_error"),
        (written(DOG | {"wrong": "\ud83d"}), "bad_error"),
        (written(DOG | {"kind": "colour"}), "unknown_kind"),
        (written(DOG | {"wrong": "a bird"}), "not_quoted"),
        (written(DOG | {"no": "There is a dog."}), "no_question"),
        (written(DOG | {"no": "is there a  CAT?"}), "contradiction"),
        (written(DOG, CATS | {"no": "Is there a cat?"}), "contradiction"),
    ],
)
def test_anything_else_is_refused(reply, told):
    assert reason(reply) == told


def test_quotes_may_differ_in_case_and_blanks():
    assert read(written(DOG | {"wrong": "A DOG on"}))[0].wrong == "A DOG on"


@given(st.text())
def test_any_text_is_read_or_refused(reply):
    with contextlib.suppress(UnreadableReply):
        assert isinstance(read(reply), tuple)


@given(st.text(), st.text(), st.text())
def test_the_prompt_holds_all_to_the_letter(question, chosen, rejected):
    told = {"question": question, "chosen": chosen, "rejected": rejected}
    filled = fill(CORRECT_PROMPT, codebook="- object", max_errors="3", **told)
    assert filled.endswith(
        f"Question: {question}\nFirst answer: {chosen}\nSecond answer: {rejected}"
    )


def test_the_schema_is_of_what_is_read():
    schema = errors_schema(KINDS)
    item = schema["properties"]["errors"]["items"]
    assert set(item["required"]) == set(item["properties"]) == set(DOG)
    assert item["properties"]["kind"]["enum"] == list(KINDS)
    assert item["additionalProperties"] is schema["additionalProperties"] is False
