"""Bodies of answers are read strictly, and outcomes written and read back as they were."""

import json

import pytest
from helpers.chat_server import reply

from mmpo_jax.chat.replies import (
    MAX_RAW,
    NO_LOG_PROB,
    ChatFailure,
    ChatReply,
    outcome_as_json,
    outcome_from_json,
    read_reply,
)

ASKED = {"model": "judge", "logprobs": True, "top_logprobs": 2, "n": 2}
TOP = [("Yes", -0.1), (" no", -2.5), ("maybe", -7.0)]


def answer(texts="Yes", top=TOP, **options):
    return reply(ASKED, texts, top, **options).body


def test_a_whole_reply():
    usage = {
        "prompt_tokens": 70,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 64},
    }
    body = answer(["Yes", "No"], model="judge-0613", finish="length", usage=usage)
    top = (("Yes", -0.1), (" no", -2.5))
    assert read_reply(body, 2, True, ["seed"]) == ChatReply(
        ("Yes", "No"), ("length", "length"), (top, top), "judge-0613", 70, 2, 64, ("seed",)
    )


def test_choices_are_put_in_order():
    body = answer(["first", "second"])
    body["choices"].reverse()
    assert read_reply(body, 2, False).texts == ("first", "second")


def test_what_servers_leave_out():
    body = answer()
    for name in ("model", "usage"):
        del body[name]
    for choice in body["choices"]:
        del choice["index"]
    found = read_reply(body, 2, False)
    assert found == ChatReply(("Yes", "Yes"), ("stop", "stop"), (None, None), None)


def test_the_chosen_token_counts_where_it_is_none_of_the_top():
    body = answer()
    for choice in body["choices"]:
        choice["logprobs"]["content"][0] |= {"token": "Perhaps", "logprob": -9.0}
    assert read_reply(body, 2, True).first_top_logprobs[1][-1] == ("Perhaps", -9.0)


def test_tokens_without_probability():
    body = json.loads(json.dumps(answer(top=[("Yes", 0.0), ("No", float("-inf"))])))
    assert read_reply(body, 2, True).first_top_logprobs[0] == (("Yes", 0.0), ("No", NO_LOG_PROB))


def test_a_text_may_be_empty_beside_log_probs():
    assert read_reply(answer(""), 2, True).texts == ("", "")
    assert read_reply(answer(None), 2, True).texts == ("", "")


def changed(path, value):
    body = answer()
    *above, last = path
    inner = body
    for name in above:
        inner = inner[name]
    inner[last] = value
    return body


FIRST = ("choices", 0)
TOKEN = (*FIRST, "logprobs", "content", 0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("Internal error", "malformed"),
        ([], "malformed"),
        ({"error": {"message": "overloaded"}}, "malformed"),
        (changed(["choices"], []), "malformed"),
        (changed(["choices"], answer()["choices"][:1]), "malformed"),
        (changed(["choices"], [1, 2]), "malformed"),
        (changed([*FIRST, "index"], 1), "malformed"),
        (changed([*FIRST, "message"], None), "malformed"),
        (changed([*FIRST, "message", "content"], [{"text": "a"}]), "malformed"),
        (changed([*FIRST, "finish_reason"], None), "malformed"),
        (changed([*FIRST, "finish_reason"], "content_filter"), "refused"),
        (changed([*FIRST, "message", "refusal"], "I will not."), "refused"),
        (changed([*FIRST, "logprobs"], None), "no_logprobs"),
        (changed([*FIRST, "logprobs"], {"content": []}), "no_logprobs"),
        (changed([*TOKEN, "logprob"], "high"), "malformed"),
        (changed([*TOKEN, "logprob"], True), "malformed"),
        (changed([*TOKEN, "logprob"], float("nan")), "malformed"),
        (changed([*TOKEN, "token"], 7), "malformed"),
        (changed([*TOKEN, "top_logprobs"], {}), "malformed"),
    ],
)
def test_what_is_no_reply(body, reason):
    found = read_reply(body, 2, True)
    assert isinstance(found, ChatFailure) and found.reason == reason and found.detail and found.raw


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_an_empty_text_is_no_reply(text):
    assert read_reply(answer(text), 2, False).reason == "malformed"


def test_a_failure_keeps_the_beginning_of_a_long_body():
    assert len(read_reply("x" * 10_000, 1, False).raw) == MAX_RAW


@pytest.mark.parametrize(
    "outcome",
    [
        ChatReply(
            ("a\n\u2028é\ud800", ""),
            ("stop", "length"),
            ((("Yes", -0.1 - 1e-17),), None),
            None,
            1,
            2,
            None,
            ("seed",),
        ),
        ChatReply((), (), (), "m"),
        ChatFailure("unknown_field", "n", "{}", "n"),
    ],
)
def test_outcomes_are_read_back_as_they_were(outcome):
    assert outcome_from_json(json.loads(json.dumps(outcome_as_json(outcome)))) == outcome
