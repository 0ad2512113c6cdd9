"""Errors as servers write them: what passes, what does not, what stops the run."""

import email.utils

import pytest

from mmpo_jax.chat.faults import read_error, retry_after
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.errors import MmpoError

SERVER = ChatServer(url="http://host/v1", model="judge")
FIELDS = [
    "max_tokens",
    "temperature",
    "n",
    "seed",
    "response_format",
    "logprobs",
    "top_logprobs",
    "chat_template_kwargs",
]


def openai(message, **fields):
    return {"error": {"message": message, "type": None, "param": None, "code": None, **fields}}


def flat(message, kind="BadRequestError"):
    return {"object": "error", "message": message, "type": kind, "param": None, "code": 400}


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (429, openai("Rate limit reached", code="rate_limit_exceeded"), "rate_limited"),
        (429, "slow down", "rate_limited"),
        (408, "", "timed_out"),
        (409, "", "server_error"),
        (500, openai("EngineCore died"), "server_error"),
        (502, "<html>Bad Gateway</html>", "server_error"),
        (503, flat("The request queue is full."), "server_error"),
        (504, "", "server_error"),
        (400, openai("too long", code="context_length_exceeded"), "too_long"),
        (400, flat("This model's maximum context length is 4096 tokens."), "too_long"),
        (400, flat("longer than the model's context length (8192 tokens)"), "too_long"),
        (
            400,
            flat("The decoder prompt (length 8357) is longer than the maximum model length of"),
            "too_long",
        ),
        (400, flat("Please reduce the length of the messages."), "too_long"),
        (400, flat("The prompt is 9000 long, max_model_len is 4096"), "too_long"),
        (400, openai("The response was filtered", code="content_filter"), "refused"),
        (400, openai("rejected by our safety system", code="content_policy_violation"), "refused"),
        (400, flat("At most 1 image(s) may be provided in one prompt."), "bad_request"),
        (400, flat("cannot identify image file"), "bad_request"),
        (400, flat("max allowed: 5, requested sample logprobs of 20"), "bad_request"),
        (413, "", "bad_request"),
        (422, {"detail": [{"type": "int_parsing", "loc": ["body", "seed"]}]}, "bad_request"),
        (501, openai("not implemented"), "bad_request"),
    ],
)
def test_reasons(status, body, reason):
    found = read_error(SERVER, status, body, FIELDS)
    assert found.reason == reason and str(status) in found.detail and found.field is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (openai("Unrecognized request argument supplied: seed"), "seed"),
        (
            openai("Unknown parameter: 'response_format'.", param="response_format"),
            "response_format",
        ),
        (
            openai("'response_format' of type 'json_schema' is not supported with this model"),
            "response_format",
        ),
        (
            openai("This model does not support it. It is an unsupported parameter.", param="seed"),
            "seed",
        ),
        (openai("You are not allowed to request logprobs from this model"), "top_logprobs"),
        (
            openai(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.",
                param="max_tokens",
            ),
            "max_tokens",
        ),
        (
            openai(
                "[{'type': 'extra_forbidden', 'loc': ('body', 'top_logprobs'), 'msg': 'Extra "
                "inputs are not permitted'}]"
            ),
            "top_logprobs",
        ),
        (
            {"detail": [{"type": "extra_forbidden", "loc": ["body", "chat_template_kwargs"]}]},
            "chat_template_kwargs",
        ),
        (openai("n > 1: 'n' is not supported"), "n"),
    ],
)
def test_fields_that_a_server_does_not_know(body, field):
    found = read_error(SERVER, 400, body, FIELDS)
    assert (found.reason, found.field) == ("unknown_field", field)


@pytest.mark.parametrize(
    "message",
    [
        "a plan that is not supported",  # the letter n
        "unsupported image; " + "x" * 100 + " seed",
        "Unrecognized request argument supplied: frequency_penalty",
    ],
)
def test_words_that_name_no_field(message):
    assert read_error(SERVER, 400, openai(message), FIELDS).reason == "bad_request"


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, openai("Incorrect API key"), "api_key_env"),
        (403, openai("Not your project"), "Not your project"),
        (404, openai("The model `judge` does not exist"), "does not exist"),
        (405, "", "look at url"),
        (307, "", "look at url"),
        (402, openai("Insufficient Balance"), "money"),
        (429, openai("You exceeded your quota", code="insufficient_quota"), "money"),
        (429, openai("You exceeded your quota", type="insufficient_quota"), "money"),
    ],
)
def test_what_stops_the_run(status, body, told):
    with pytest.raises(MmpoError, match=told) as found:
        read_error(SERVER, status, body)
    assert SERVER.url in str(found.value) and "judge" in str(found.value)


def test_retry_after():
    date = email.utils.formatdate(1000, usegmt=True)
    assert retry_after("1.5", 0) == 1.5
    assert retry_after(date, 990) == 10
    assert retry_after(date, 2000) == 0
    assert retry_after("-3", 0) == 0
    for nothing in (None, "", "soon", "nan", "inf"):
        assert retry_after(nothing, 0) is None
