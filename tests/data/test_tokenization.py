"""The tokenisation contract: one BOS, one EOS, whole images, one prompt for all responses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import tokenize, tokenize_records
from mmpo_jax.picture_world.processor import CHAT_TEMPLATE, TOKENS

IMAGE = ImageRef("image", b"never decoded here")
N = 4  # image tokens
LIMITS = {"max_prompt": 64, "max_response": 32}


def words(text: str) -> list[int]:
    """What a tokenizer of one token per word makes of a text, every image already expanded."""
    return [TOKENS.index(word) for word in text.split()]


def expand(text: str) -> str:
    return text.replace("<image>", " ".join(["<image>"] * N))


def record(*answers, prompt="what is in the picture ?", images=1) -> Record:
    return Record(
        id="r",
        images=(IMAGE,) * images,
        prompt=(Turn("user", prompt),) if prompt is not None else (),
        responses=tuple(
            Response.of(answer) if isinstance(answer, str) else answer for answer in answers
        ),
    )


def turns(*texts, first="assistant") -> Response:
    roles = ("assistant", "user") if first == "assistant" else ("user", "assistant")
    return Response(tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)))


@pytest.fixture
def make_processor(tiny_folder, tmp_path):
    """A processor with another chat template, or a tokenizer that adds BOS by itself."""

    def make(template=CHAT_TEMPLATE, adds_bos=False):
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        if adds_bos:
            path = folder / "tokenizer.json"
            tokenizer = json.loads(path.read_text())
            tokenizer["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            }
            path.write_text(json.dumps(tokenizer))
        return Processor(folder, load_config(folder))

    return make


def test_a_prompt_and_two_responses(tiny_processor):
    row = tokenize(record("a red star", "yes"), tiny_processor, **LIMITS)
    prompt = "<s> USER: <image> what is in the picture ? ASSISTANT:"
    assert row.prompt_ids.tolist() == words(expand(prompt))
    assert row.prompt_ids.dtype == np.int32
    assert [r.ids.tolist() for r in row.responses] == [words("a red star </s>"), words("yes </s>")]
    for response in row.responses:
        assert response.loss_mask.all()
        assert response.ids.dtype == np.int32
        assert response.truncated == 0
    assert (row.id, row.images) == ("r", (IMAGE,))


def test_special_tokens_once(tiny_processor):
    row = tokenize(record("a red star", "yes", images=2), tiny_processor, **LIMITS)
    prompt = row.prompt_ids.tolist()
    assert prompt[0] == tiny.BOS_ID
    assert prompt.count(tiny.BOS_ID) == 1
    assert prompt.count(tiny.EOS_ID) == 0
    assert prompt.count(tiny.IMAGE_ID) == 2 * N
    for response in row.responses:
        assert response.ids.tolist().count(tiny.EOS_ID) == 1
        assert response.ids[-1] == tiny.EOS_ID
        assert tiny.BOS_ID not in response.ids


def test_a_prompt_is_the_same_in_training_and_in_generation(tiny_processor):
    earlier = (Turn("user", "is there a star ?"), Turn("assistant", "yes"), Turn("user", "red ?"))
    for prompt in [(Turn("user", "what is in the picture ?"),), earlier]:
        rows = [
            tokenize(Record("r", (IMAGE,), prompt, responses), tiny_processor, **LIMITS)
            for responses in [(), (Response.of("yes"),), (Response.of("no"), Response.of("a star"))]
        ]
        for row in rows[1:]:
            assert row.prompt_ids.tolist() == rows[0].prompt_ids.tolist()
        assert rows[0].responses == ()


def test_earlier_answers_belong_to_the_prompt(tiny_processor):
    """They are neither learned nor left out when the last question is answered."""
    earlier = (Turn("user", "is there a star ?"), Turn("assistant", "yes"), Turn("user", "red ?"))
    text = "<s> USER: <image> is there a star ? ASSISTANT: yes </s> USER: red ? ASSISTANT:"
    for responses in [(), (Response.of("no"), Response.of("yes"))]:
        row = tokenize(Record("r", (IMAGE,), earlier, responses), tiny_processor, **LIMITS)
        assert row.prompt_ids.tolist() == words(expand(text))
    assert [r.ids.tolist() for r in row.responses] == [words("no </s>"), words("yes </s>")]


def test_too_long_a_prompt_is_refused_whole(tiny_processor):
    length = len(tokenize(record("yes"), tiny_processor, **LIMITS).prompt_ids)
    tokenize(record("yes"), tiny_processor, max_prompt=length, max_response=2)
    with pytest.raises(UnusableRow, match=f"{length} tokens, the limit is {length - 1}") as caught:
        tokenize(record("yes"), tiny_processor, max_prompt=length - 1, max_response=2)
    assert caught.value.reason == "prompt_too_long"


def test_an_over_long_response_loses_its_tail(tiny_processor):
    row = tokenize(record("a red star", "yes"), tiny_processor, max_prompt=64, max_response=3)
    long, short = row.responses
    assert long.ids.tolist() == words("a red star")
    assert long.loss_mask.tolist() == [True] * 3
    assert (long.truncated, short.truncated) == (1, 0)
    assert short.ids.tolist() == words("yes </s>")


def test_only_the_assistant_is_learned_in_a_dialogue(tiny_processor):
    dialogue = turns("a star", "is there a red ring ?", "no")
    row = tokenize(record(dialogue), tiny_processor, **LIMITS)
    (response,) = row.responses
    text = "a star </s> USER: is there a red ring ? ASSISTANT: no </s>"
    assert response.ids.tolist() == words(text)
    learned = [TOKENS[token] for token in response.ids[response.loss_mask]]
    assert learned == ["a", "star", "</s>", "no", "</s>"]


def test_dialogues_that_share_only_the_image(tiny_processor):
    row = tokenize(
        record(
            turns("is there a red star ?", "yes", first="user"),
            turns("is there a blue ring ?", "no", "a star ?", "yes", first="user"),
            prompt=None,
        ),
        tiny_processor,
        **LIMITS,
    )
    shared = "<s> USER: <image> is there a"
    assert row.prompt_ids.tolist() == words(expand(shared))
    texts = [
        "red star ? ASSISTANT: yes </s>",
        "blue ring ? ASSISTANT: no </s> USER: a star ? ASSISTANT: yes </s>",
    ]
    learned = ["yes </s>", "no </s> yes </s>"]
    for response, text, answers in zip(row.responses, texts, learned, strict=True):
        assert response.ids.tolist() == words(text)
        assert response.ids[response.loss_mask].tolist() == words(answers)


def test_questions_end_with_the_assistants_header(tiny_processor):
    ask = record(
        Response((Turn("user", "is there a red star ?"),)),
        Response((Turn("user", "is the ring blue ?"),)),
        prompt=None,
    )
    row = tokenize(ask, tiny_processor, **LIMITS)
    assert row.prompt_ids.tolist() == words(expand("<s> USER: <image> is"))
    assert [r.ids.tolist() for r in row.responses] == [
        words("there a red star ? ASSISTANT:"),
        words("the ring blue ? ASSISTANT:"),
    ]
    assert not any(r.loss_mask.any() for r in row.responses)
    with pytest.raises(UnusableRow) as caught:
        tokenize(ask, tiny_processor, max_prompt=64, max_response=5)
    assert caught.value.reason == "question_too_long"


def test_nothing_to_learn_is_refused(tiny_processor):
    dialogue = turns("is there a red star ?", "yes", first="user")
    other = turns("what is in the picture ?", "a star", first="user")
    row = record(dialogue, other, prompt=None)
    with pytest.raises(UnusableRow) as caught:
        tokenize(row, tiny_processor, max_prompt=64, max_response=4)
    assert caught.value.reason == "empty_response"


def test_images_that_no_prompt_shares_stand_in_the_responses(tiny_processor):
    system = [Turn("system", "a red star"), Turn("system", "the ring")]
    row = tokenize(
        record(
            *(Response((turn, Turn("user", "yes ?"), Turn("assistant", "no"))) for turn in system),
            prompt=None,
        ),
        tiny_processor,
        **LIMITS,
    )
    assert row.shows_later
    assert tiny.IMAGE_ID not in row.prompt_ids
    for response in row.responses:
        assert (response.ids == tiny.IMAGE_ID).sum() == len(row.layouts[0].ids)


def test_an_image_token_written_by_the_user_is_an_unknown_word(tiny_processor):
    """Of words, where the text itself is the token."""
    row = tokenize(record("yes", prompt="what is <image> ?"), tiny_processor, **LIMITS)
    other = tokenize(record("yes", prompt="what is grass ?"), tiny_processor, **LIMITS)
    assert row.prompt_ids.tolist() == other.prompt_ids.tolist()


WITHOUT_BOS = CHAT_TEMPLATE.replace("{{- '<s>' -}}", "")
WITHOUT_EOS = CHAT_TEMPLATE.replace("{{- ' </s>' -}}", "{{- '' -}}")
TWICE_EOS = CHAT_TEMPLATE.replace("{{- ' </s>' -}}", "{{- ' </s> </s> .' -}}")


@pytest.mark.parametrize(
    ("template", "adds_bos", "count"),
    [(CHAT_TEMPLATE, True, 1), (WITHOUT_BOS, True, 1), (WITHOUT_BOS, False, 0)],
    ids=["both-write-bos", "tokenizer-adds-bos", "model-without-bos"],
)
def test_bos_whoever_writes_it(make_processor, template, adds_bos, count):
    processor = make_processor(template, adds_bos)
    assert processor.adds_bos == adds_bos
    row = tokenize(record("a red star"), processor, **LIMITS)
    prompt = "<s> USER: <image> what is in the picture ? ASSISTANT:"
    assert row.prompt_ids.tolist() == words(expand(prompt))[1 - count :]
    assert row.responses[0].ids.tolist() == words("a red star </s>")


@pytest.mark.parametrize("template", [WITHOUT_EOS, TWICE_EOS], ids=["none", "twice"])
def test_eos_whatever_the_template_writes(make_processor, template):
    row = tokenize(record("a red star"), make_processor(template), **LIMITS)
    assert row.responses[0].ids.tolist() == words("a red star </s>")
    assert row.responses[0].loss_mask.all()


def test_a_template_that_rewrites_earlier_turns_is_refused(make_processor):
    # As reasoning models' templates do: earlier answers lose something when a new turn comes.
    template = CHAT_TEMPLATE.replace(
        "{%- for message in messages -%}",
        "{{- ' a' if messages | length > 3 -}}{%- for message in messages -%}",
        1,
    )
    processor = make_processor(template)
    tokenize(record("yes"), processor, **LIMITS)
    with pytest.raises(UnusableRow, match="rewrites what stands before") as caught:
        tokenize(record(turns("yes", "a star ?", "no")), processor, **LIMITS)
    assert caught.value.reason == "template_refuses"


@pytest.mark.parametrize("code", [0x10F000, 0x10F001, 0x10F200, 0x10FFFD])
@pytest.mark.parametrize("place", ["prompt", "response", "key", "argument"])
def test_characters_that_stand_for_control_tokens_are_refused(tiny_processor, code, place):
    text = f"a {chr(code)} star"
    row = record("yes", "no", "a star")
    if place == "prompt":
        row = dataclasses.replace(row, prompt=(Turn("user", text),))
    elif place == "response":
        row = dataclasses.replace(row, responses=(Response.of("yes"), Response.of(text)))
    elif place == "key":
        row = dataclasses.replace(row, prompt=(Turn("user", "a star", {"name": text}),))
    else:
        row = dataclasses.replace(row, template={"tools": [{"name": text}]})
    kept, skipped = tokenize_records([row], tiny_processor, None)
    assert kept == []
    assert [one.reason for one in skipped] == ["bad_text"]
