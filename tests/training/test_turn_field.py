"""The field `turn`: which of a row's tokens are the response, and which correct another one."""

import dataclasses

import numpy as np
import pytest

from mmpo_jax.correction.corrections import Error, corrected
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.training.fields import lacks, maker_of
from mmpo_jax.training.row_use import best

ERROR = Error("object", "a star", "is there a red ring ?", "is there a star ?")
PAIR = (Response.of("there is a red ring", 1), Response.of("there is a star", 2))
PICTURE = ImageRef("scene", png_bytes(sample_scene("test", 0, 0), 24))
RECORD = Record("a", (PICTURE,), (Turn("user", "what is it ?"),), PAIR)


@pytest.fixture
def turns(tiny_processor):
    """What the assistant says of a record's learned responses, by turn."""

    def turns(record):
        row = best(tokenize(record, tiny_processor, 100, 100))
        said = {}
        numbers = maker_of("turn")(row)
        for response, of_response in zip(row.responses, numbers, strict=True):
            for number in np.unique(of_response):
                here = (of_response[: len(response.ids)] == number) & response.loss_mask
                if here.any():
                    text = tiny_processor.decode(response.ids[here].tolist())
                    said.setdefault(int(number), []).append(text)
        return said, lacks(row, "turn")

    return turns


@pytest.mark.parametrize("layout", ["dialogue", "apart"])
def test_the_response_is_turn_0_and_answers_count_on(turns, layout):
    said, problem = turns(corrected(RECORD, [ERROR], ("yes", "no"), 0, layout))
    assert problem is None
    assert said[0] == ["there is a red ring"]
    assert sorted(text for number in (1, 2) for text in said[number]) == ["no", "yes"]


def test_responses_alone_have_no_dialogue(turns):
    said, (reason, _) = turns(RECORD)
    assert (list(said), reason) == ([0], "no_dialogue")


def test_answers_to_one_prompt_are_no_corrections(turns):
    """Nothing ranks them, but each answers the prompt."""
    plain = tuple(dataclasses.replace(response, rank=None) for response in PAIR)
    said, (reason, _) = turns(dataclasses.replace(RECORD, responses=plain))
    assert (list(said), reason) == ([0], "no_dialogue")
