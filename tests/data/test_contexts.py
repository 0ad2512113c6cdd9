"""Records in several contexts: who stands where, and what is the same in all of them."""

import dataclasses

import numpy as np
import pytest

from mmpo_jax.data.contexts import (
    MAIN,
    OTHER_IMAGE,
    OtherImage,
    arranged,
    context_names,
    filled_responses,
    tokenize_contexts,
)
from mmpo_jax.data.records import Edit, ImageRef, Record, Response, Turn, VideoRef
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.data.tokenized_rows import fingerprint_records

LIMITS = {"max_prompt": 64, "max_response": 32}
IMAGES = [ImageRef(name, name.encode()) for name in ("first", "second", "third")]
QUESTION = (Turn("user", "what is in the picture ?"),)
OTHER_QUESTION = (Turn("user", "is there a star ?"),)


def record(*responses, prompt=QUESTION, images=(IMAGES[0],)):
    return Record("r", tuple(images), prompt, responses)


def response(text, rank, **own):
    return dataclasses.replace(Response.of(text, rank), **own)


PAIR = (response("a red star", 1), response("a blue ring", 2))


def lengths(row):
    return [len(r.ids) for r in row.responses]


def test_a_plain_record_has_one_context(tiny_processor):
    plain = record(*PAIR)
    ours = tokenize_contexts(plain, tiny_processor, **LIMITS)
    assert ours.others == ()
    assert fingerprint_records([ours]) == fingerprint_records(
        [tokenize(plain, tiny_processor, **LIMITS)]
    )


def test_responses_with_images_of_their_own(tiny_processor):
    rejected = dataclasses.replace(PAIR[1], images=(IMAGES[1],))
    row = tokenize_contexts(record(PAIR[0], rejected), tiny_processor, **LIMITS)
    ((name, second),) = row.others
    assert (name, row.id, second.id) == (MAIN, "r", "r#main2")
    assert (row.images, second.images) == ((IMAGES[0],), (IMAGES[1],))
    assert (lengths(row), lengths(second)) == ([4, 0], [0, 4])
    np.testing.assert_array_equal(row.prompt_ids, second.prompt_ids)
    assert [r.source.rank for r in row.responses] == [r.source.rank for r in second.responses]
    assert [len(r.ids) for r in filled_responses(row)] == [4, 4]
    assert row.ranked


def test_responses_with_prompts_of_their_own(tiny_processor):
    rejected = dataclasses.replace(PAIR[1], prompt=OTHER_QUESTION)
    row = tokenize_contexts(record(PAIR[0], rejected), tiny_processor, **LIMITS)
    ((_, second),) = row.others
    alone = record(PAIR[1], prompt=OTHER_QUESTION)
    alone = tokenize(alone, tiny_processor, **LIMITS)
    np.testing.assert_array_equal(second.prompt_ids, alone.prompt_ids)
    np.testing.assert_array_equal(second.responses[1].ids, alone.responses[0].ids)


def test_whole_instructions_count_where_they_differ(tiny_processor):
    """With one image for both, it is encoded once, and the prompts are part of the responses."""

    def counted(response):
        return tiny_processor.decode(response.ids[response.loss_mask].tolist())

    rejected = dataclasses.replace(PAIR[1], prompt=OTHER_QUESTION)
    row = tokenize_contexts(record(PAIR[0], rejected), tiny_processor, joint=True, **LIMITS)
    assert not row.others
    said = [counted(response) for response in row.responses]
    assert said == [
        "what is in the picture ? ASSISTANT: a red star",
        "is there a star ? ASSISTANT: a blue ring",
    ]
    rejected = dataclasses.replace(rejected, images=(IMAGES[1],))
    row = tokenize_contexts(record(PAIR[0], rejected), tiny_processor, joint=True, **LIMITS)
    assert [counted(response) for response in filled_responses(row)] == said
    same = tokenize_contexts(record(*PAIR), tiny_processor, joint=True, **LIMITS)
    assert [counted(r).split(" ASS")[0] for r in same.responses] == [QUESTION[0].text] * 2


@pytest.mark.parametrize("kind", ["crop", "noise", "black", "blank", "rotate"])
def test_another_image_that_is_made(tiny_processor, kind):
    video = VideoRef("v", (IMAGES[1], IMAGES[2]))
    row = record(*PAIR)
    made = tokenize_contexts(row, tiny_processor, other=OtherImage(kind, 500, 3), **LIMITS)
    ((name, other),) = made.others
    assert (name, other.id) == (OTHER_IMAGE, "r#other_image")
    edit = other.images[0].edit
    assert isinstance(edit, Edit)
    assert (edit.kind, edit.step) == (kind, 500)
    assert dataclasses.replace(other.images[0], edit=None) == IMAGES[0]
    for ours, theirs in zip(made.responses, other.responses, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.loss_mask, theirs.loss_mask)
    again = tokenize_contexts(row, tiny_processor, other=OtherImage(kind, 500, 3), **LIMITS)
    assert again.others[0][1].images == other.images
    for changed in (
        tokenize_contexts(row, tiny_processor, other=OtherImage(kind, 500, 4), **LIMITS),
        tokenize_contexts(
            dataclasses.replace(row, id="s"),
            tiny_processor,
            other=OtherImage(kind, 500, 3),
            **LIMITS,
        ),
    ):
        assert changed.others[0][1].images[0].edit.seed != edit.seed
        assert fingerprint_records([changed]) != fingerprint_records([made])
    assert video.frames[0].edit is None


def test_another_image_for_each_side(tiny_processor):
    rejected = dataclasses.replace(PAIR[1], images=(IMAGES[1],))
    row = tokenize_contexts(
        record(PAIR[0], rejected), tiny_processor, other=OtherImage("black"), **LIMITS
    )
    assert [name for name, _ in row.others] == [MAIN, OTHER_IMAGE, OTHER_IMAGE]
    assert [other.images[0].name for _, other in row.others] == ["second", "first", "second"]
    assert [lengths(other) for _, other in row.others] == [[0, 4], [4, 0], [0, 4]]
    assert len({other.id for _, other in row.others} | {row.id}) == 4


def test_another_image_of_the_data(tiny_processor):
    """ms-swift's `rejected_images`, and a third response that is the chosen one about another."""
    given = OtherImage(None)
    rejected = dataclasses.replace(PAIR[1], images=(IMAGES[1],))
    mixed_up = response("a red star", 3, images=(IMAGES[1],))
    for responses in ((PAIR[0], rejected), (*PAIR, mixed_up)):
        row = tokenize_contexts(record(*responses), tiny_processor, other=given, **LIMITS)
        ((name, other),) = row.others
        assert name == OTHER_IMAGE
        assert (row.images, other.images) == ((IMAGES[0],), (IMAGES[1],))
        assert (lengths(row), lengths(other)) == ([4, 4], [4, 4])
    given_apart = dataclasses.replace(record(*PAIR), other_images=(IMAGES[2],))
    row = tokenize_contexts(given_apart, tiny_processor, other=given, **LIMITS)
    assert [other.images for _, other in row.others] == [(IMAGES[2],)]
    assert tokenize_contexts(given_apart, tiny_processor, **LIMITS).others == ()
    with pytest.raises(UnusableRow, match="the data give none, nor a response its own") as error:
        tokenize_contexts(record(*PAIR), tiny_processor, other=given, **LIMITS)
    assert error.value.reason == "no_other_image"


def test_no_image_to_change(tiny_processor):
    row = record(*PAIR, images=())
    with pytest.raises(UnusableRow, match="no image to change"):
        tokenize_contexts(row, tiny_processor, other=OtherImage("crop"), **LIMITS)


def test_records_with_different_contexts_in_one_order(tiny_processor):
    own = dataclasses.replace(PAIR[1], images=(IMAGES[1],))
    rows = [
        tokenize_contexts(record(*pair), tiny_processor, other=OtherImage("black"), **LIMITS)
        for pair in (PAIR, (PAIR[0], own))
    ]
    names = context_names(rows)
    assert names == (MAIN, MAIN, OTHER_IMAGE, OTHER_IMAGE)
    plain, both = (arranged(row, names) for row in rows)
    assert [row is None for row in plain] == [False, True, False, True]
    assert plain[2].images[0].edit is not None
    assert [row.id for row in both] == ["r", "r#main2", "r#other_image", "r#other_image2"]
