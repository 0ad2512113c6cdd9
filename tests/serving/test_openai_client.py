"""The official client talks to the server, and hears what `mmpo generate` and `mmpo score` say."""

import json

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs pip install 'mmpo_jax[bridges]'")
pytest.importorskip("uvicorn", reason="needs pip install 'mmpo_jax[bridges]'")

import openai
from helpers import served
from helpers.served import NAME, body, picture, user

import mmpo_jax as mm

DESCRIBE = "describe the picture ."
ASKED = [
    (DESCRIBE, picture(0)),
    ("what is in the picture ?", picture(1)),
    ("is there a star ?", picture(2)),
    ("is there a red circle ?",),
]


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=service[1], api_key="none", max_retries=0) as client:
        yield client


def ask(client, *messages, **more):
    return client.chat.completions.create(**body(*messages, **more))


def test_greedy_answers_are_those_of_generate(client, greedy):
    for (text, *pictures), answer in zip(ASKED, greedy(ASKED), strict=True):
        said = ask(client, user(text, *pictures))
        assert said.choices[0].message.content == answer
        assert said.choices[0].finish_reason == "stop"
        assert said.model == NAME and said.object == "chat.completion"
        assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.chat.completions.create(**body(user("a")) | {"model": "other"})


def test_samples_share_a_prompt_and_a_seed_gives_them_again(client):
    drawn = []
    for seed, top_p in ((5, 1), (5, 1), (-6, 1), (5, 1e-6)):
        said = ask(client, user(*ASKED[0]), n=4, temperature=2, seed=seed, top_p=top_p)
        drawn.append([choice.message.content for choice in said.choices])
    assert len(drawn[0]) == 4 and len(set(drawn[0])) > 1
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[3])) == 1


def test_a_stream_says_the_same(client):
    asked = {"n": 3, "temperature": 1, "seed": 2, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, user(*ASKED[0]), **asked)
    usage = {"include_usage": True}
    events = list(ask(client, user(*ASKED[0]), **asked, stream=True, stream_options=usage))
    assert events[-1].usage == whole.usage and not events[-1].choices
    for number, choice in enumerate(whole.choices):
        own = [e.choices[0] for e in events[:-1] if e.choices[0].index == number]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
        told = [t.token for c in own if c.logprobs for t in c.logprobs.content]
        assert told == [t.token for t in choice.logprobs.content]


def test_log_probs_are_the_models_own(client, checkpoint):
    """Sums are those of `mmpo score`, whatever the temperature that was sampled at."""
    asked = {"n": 3, "temperature": 1.7, "seed": 1, "logprobs": True, "top_logprobs": 20}
    said = ask(client, user(*ASKED[0]), **asked)
    texts = [choice.message.content for choice in said.choices if choice.finish_reason == "stop"]
    record = mm.record(DESCRIBE, images=[ASKED[0][1]], responses=texts)
    ((*sums,),) = mm.log_probs(checkpoint, [record])
    told = [
        sum(token.logprob for token in choice.logprobs.content)
        for choice in said.choices
        if choice.finish_reason == "stop"
    ]
    assert texts
    np.testing.assert_allclose(told, sums, rtol=1e-4, atol=1e-4)
    first = said.choices[0].logprobs.content[0]
    values = [token.logprob for token in first.top_logprobs]
    assert len(values) == 20 and values == sorted(values, reverse=True)
    assert bytes(first.bytes).decode() == first.token


def test_a_stop_ends_an_answer_in_front_of_it(client, greedy):
    (answer,) = greedy(ASKED[:1])
    words = answer.split(" ")
    stop = " ".join(words[3:5])
    said = ask(client, user(*ASKED[0]), stop=["never said", stop])
    assert said.choices[0].finish_reason == "stop"
    assert said.choices[0].message.content == answer[: answer.index(stop)]
    assert said.usage.completion_tokens == 5
    events = ask(client, user(*ASKED[0]), stop=stop, stream=True)
    streamed = "".join(event.choices[0].delta.content or "" for event in events)
    assert streamed == said.choices[0].message.content


def test_what_asks_for_more_than_fits_gets_what_fits(client, greedy):
    said = ask(client, user(*ASKED[0]), max_tokens=32768)
    assert said.choices[0].message.content == greedy(ASKED[:1])[0]
    short = ask(client, user(*ASKED[0]), max_tokens=None, max_completion_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match=r"the prompt has 1\d{3} tokens") as error:
        ask(client, user("star " * 1200))
    assert error.value.code == "context_length_exceeded"


def test_several_turns_and_the_beginning_of_an_answer(client, greedy):
    (answer,) = greedy(ASKED[:1])
    turns = [user(*ASKED[0]), {"role": "assistant", "content": answer}, user("is there a star ?")]
    said = ask(client, {"role": "system", "content": "a picture"}, *turns)
    assert said.choices[0].message.content in ("yes", "no")
    begun = {"role": "assistant", "content": " ".join(answer.split()[:2])}
    more = {"continue_final_message": True, "add_generation_prompt": False}
    said = ask(client, user(*ASKED[0]), begun, extra_body=more)
    assert (begun["content"] + " " + said.choices[0].message.content.strip()) == answer


def test_our_own_labeler_reads_the_probabilities(service, checkpoint, tmp_path):
    from helpers.meshes import one_device

    from mmpo_jax.chat.client import ChatClient
    from mmpo_jax.chat.server import ChatServer
    from mmpo_jax.data.records import ImageRef
    from mmpo_jax.feedback.chat_labeler import ChatLabeler
    from mmpo_jax.feedback.labeler import CheckpointLabeler
    from mmpo_jax.recipes.feedback import ChatLabeling

    address = {"url": service[1], "model": NAME}
    questions = ("is there a red circle in the picture ?", "is there a blue star in the picture ?")
    items = [(str(seed), (ImageRef("a", picture(seed)),), questions) for seed in range(3)]
    with ChatClient(ChatServer(**address), tmp_path / "journal") as client:
        asked = ChatLabeling(**address)
        told = ChatLabeler(client, asked).answer(items)
    own = CheckpointLabeler(checkpoint, one_device(), None, batch_size=4).answer(items)
    for served_ones, ones in zip(told, own, strict=True):
        for a, b in zip(served_ones, ones, strict=True):
            assert a.read == "logprobs"
            assert (a.p_yes, a.p_no) == pytest.approx((b.p_yes, b.p_no), abs=1e-4)


def test_nothing_is_left_behind(service, client):
    ask(client, user("a"))
    served.wait_until_idle(service[0])
    assert json.loads(client.get("/../health", cast_to=str))["requests"] == 0
