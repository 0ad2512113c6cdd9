"""The tokenisation contract for any dialogue, against a reader of what the template renders.

Two tokenizers: one of whole words, where a rendering's tokens are its words, and one of bytes,
whose decoding gives a text back to the letter.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from helpers import tiny
from hypothesis import assume, given
from hypothesis import strategies as st

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import IMAGE, ImageRef, Record, Response, Turn
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.picture_world.processor import TOKENS

PICTURE = ImageRef("image", b"never decoded here")
N = 4
"""Tokens of an image."""
LONG = 10_000
"""A limit that no dialogue here reaches."""

WORDS = st.lists(st.sampled_from(TOKENS[tiny.FIRST_WORD :]), min_size=1, max_size=4).map(" ".join)
LETTERS = st.text("aé星 \n.:x", min_size=1, max_size=8).filter(lambda text: text.strip())


@pytest.fixture(scope="module")
def bytes_processor(tmp_path_factory):
    folder = tiny.make_byte_level_folder(tmp_path_factory.mktemp("bytes") / "model")
    return Processor(folder, load_config(folder))


def asked(texts, most=2):
    """A user's turn with up to so many images in front of its text."""
    pictures = st.lists(st.just(IMAGE), max_size=most)
    return st.builds(lambda shown, text: Turn("user", (*shown, text)), pictures, texts)


def answered(texts):
    return st.builds(Turn, st.just("assistant"), texts, learned=st.booleans())


def continuations(texts):
    """What goes on from a question: an answer, then questions and answers."""
    later = st.lists(st.tuples(asked(texts, most=1), answered(texts)), max_size=2)
    learned = st.builds(Turn, st.just("assistant"), texts)
    return st.tuples(later, learned).map(lambda both: _by_turns(*both))


def _by_turns(later, last):
    """The first answers in front of their next questions, and one that is learned at the end."""
    turns = []
    for question, answer in later:
        turns += [answer, question]
    return (*turns, last)


@st.composite
def records(draw, texts, shown_later=True):
    """A prompt of one to five turns, and up to three responses that show as many images."""
    before = draw(st.lists(st.tuples(asked(texts), answered(texts)), max_size=2))
    prompt = (*(turn for pair in before for turn in pair), draw(asked(texts)))
    several = draw(st.lists(continuations(texts), min_size=1, max_size=3))
    if not shown_later:
        several = [tuple(map(_without_media, turns)) for turns in several]
    counts = {sum(len(turn.media) for turn in turns) for turns in several}
    assume(len(counts) == 1)
    images = sum(len(turn.media) for turn in prompt) + counts.pop()
    responses = tuple(Response(turns, finished=draw(st.booleans())) for turns in several)
    return Record("r", (PICTURE,) * images, prompt, responses)


def _without_media(turn):
    return dataclasses.replace(turn, content=turn.text)


def rendered(turns, ends):
    """[(text, whether it is learned)] as the picture world's template writes a dialogue.

    Args:
      turns: the dialogue.
      ends: False for a last answer without its EOS.
    """
    pieces = [("<s>", False)]
    for turn in turns:
        said = " ".join(["<image>" * (piece is IMAGE) or piece for piece in turn.content])
        said = turn.content if isinstance(turn.content, str) else said
        if turn.role == "user":
            pieces.append((f" USER: {said}", False))
        else:
            pieces.append((" ASSISTANT:", False))
            end = " </s>" if ends or turn is not turns[-1] else ""
            pieces.append((f" {said}{end}", turn.learned))
    return pieces


def tokens_of(pieces):
    """(ids, loss mask) of what was rendered, by a tokenizer of whole words."""
    words = [(word, learned) for text, learned in pieces for word in text.split()]
    expanded = [pair for pair in words for _ in range(N if pair[0] == "<image>" else 1)]
    return [TOKENS.index(word) for word, _ in expanded], [learned for _, learned in expanded]


def whole(row, response):
    """(ids, loss mask) of a prompt and one of its responses."""
    ids = [*row.prompt_ids.tolist(), *response.ids.tolist()]
    return ids, [*[False] * len(row.prompt_ids), *response.loss_mask.tolist()]


@given(record=records(WORDS))
def test_ids_and_loss_masks_are_those_of_the_rendering(tiny_processor, record):
    row = tokenize(record, tiny_processor, LONG, LONG)
    prompt, _ = tokens_of([*rendered(record.prompt, True), (" ASSISTANT:", False)])
    assert row.prompt_ids.tolist() == prompt
    for made, response in zip(row.responses, record.responses, strict=True):
        pieces = rendered((*record.prompt, *response.turns), response.finished)
        ids, mask = tokens_of(pieces)
        mask[: len(prompt)] = [False] * len(prompt)  # earlier answers are the prompt's
        assert whole(row, made) == (ids, mask)
        assert made.truncated == 0


@given(record=records(LETTERS, shown_later=False))
def test_decoded_they_are_the_text_to_the_letter(bytes_processor, record):
    row = tokenize(record, bytes_processor, LONG, LONG)
    for made, response in zip(row.responses, record.responses, strict=True):
        ids, mask = map(np.array, whole(row, made))
        pieces = rendered((*record.prompt, *response.turns), response.finished)
        text = "".join(text for text, _ in pieces).replace("<image>", "<image>" * N)
        assert bytes_processor.tokenizer.decode(ids) == text
        own = rendered(response.turns, response.finished)
        learned = "".join(text for text, learned in own if learned)
        assert bytes_processor.tokenizer.decode(ids[mask]) == learned


@given(record=records(WORDS), max_prompt=st.integers(1, 40), max_response=st.integers(1, 20))
def test_limits_cut_tails_and_never_an_image(tiny_processor, record, max_prompt, max_response):
    longest = tokenize(record, tiny_processor, LONG, LONG)
    lost = [response.ids[max_response:] for response in longest.responses]
    left = [response.loss_mask[:max_response].any() for response in longest.responses]
    fits = len(longest.prompt_ids) <= max_prompt
    if fits and all(left) and not any(tiny.IMAGE_ID in tail for tail in lost):
        row = tokenize(record, tiny_processor, max_prompt, max_response)
        assert row.prompt_ids.tolist() == longest.prompt_ids.tolist()
        for cut, response, tail in zip(row.responses, longest.responses, lost, strict=True):
            assert [*cut.ids, *tail] == response.ids.tolist()
            assert cut.loss_mask.tolist() == response.loss_mask.tolist()[:max_response]
            assert cut.truncated == len(tail)
    else:
        with pytest.raises(UnusableRow) as error:
            tokenize(record, tiny_processor, max_prompt, max_response)
        reasons = {"prompt_too_long"} if not fits else {"empty_response", "response_too_long"}
        assert error.value.reason in reasons


@given(record=records(WORDS))
def test_responses_know_nothing_of_their_siblings(tiny_processor, record):
    together = tokenize(record, tiny_processor, LONG, LONG)
    for response, made in zip(record.responses, together.responses, strict=True):
        alone = dataclasses.replace(record, responses=(response,))
        row = tokenize(alone, tiny_processor, LONG, LONG)
        assert whole(row, row.responses[0]) == whole(together, made)


@given(record=records(WORDS), max_prompt=st.integers(1, 40))
def test_whole_dialogues_share_what_they_begin_with(tiny_processor, record, max_prompt):
    """Without a prompt, as supervised data come: the cut changes neither tokens nor masks."""
    dialogues = tuple(
        dataclasses.replace(response, turns=(*record.prompt, *response.turns))
        for response in record.responses
    )
    record = dataclasses.replace(record, prompt=(), responses=dialogues)
    expected = [tokens_of(rendered(r.turns, r.finished)) for r in dialogues]
    asked_first = tokens_of([*rendered(dialogues[0].turns[:1], True), (" ASSISTANT:", False)])[0]
    columns = zip(asked_first, *(ids for ids, _ in expected), strict=False)
    same = [tokens[0] for tokens in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns)]
    if tiny.IMAGE_ID in same[max_prompt:]:
        with pytest.raises(UnusableRow, match="the prompt has"):
            tokenize(record, tiny_processor, max_prompt, LONG)
    else:
        row = tokenize(record, tiny_processor, max_prompt, LONG)
        assert [whole(row, response) for response in row.responses] == expected
        assert row.prompt_ids.tolist() == same[:max_prompt]
