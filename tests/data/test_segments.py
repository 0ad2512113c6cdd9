"""What differs between responses, and which tokens spans of their text are."""

import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, Record, Response, Span, Turn
from mmpo_jax.data.segments import changed_segments
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.picture_world.processor import CHAT_TEMPLATE

IMAGE = ImageRef("image", b"never decoded here")
TEXT = "a red star and a green ring"


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("abcXdef", "abcYZdef", ([(3, 4)], [(3, 5)])),
        ("abcdef", "abcdef", ([], [])),
        ("abcdef", "abcXdef", ([], [])),  # only inserted
        ("abcXdef", "abcdef", ([], [])),  # only left out
        ("abcXdeYfgh", "abcVdeWfgh", ([(3, 7)], [(3, 7)])),  # "de" is too short to be the same
        ("Xabcdef", "Yabcdef", ([(0, 1)], [(0, 1)])),
        ("abcX", "abcYZ", ([(3, 4)], [(3, 5)])),
        ("ab", "cd", ([(0, 2)], [(0, 2)])),
        ("", "cd", ([], [])),
        ("", "", ([], [])),
    ],
)
def test_changed_segments(ours, theirs, expected):
    assert changed_segments(ours, theirs) == expected
    assert changed_segments(list(ours), list(theirs)) == expected


@pytest.fixture(scope="module", params=["words", "sentencepiece", "bytes"])
def processor(request, tiny_processor, tmp_path_factory):
    """Tokenizers of whole words, with a space in front of words, and of bytes."""
    if request.param == "words":
        return tiny_processor
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "sentencepiece":
        folder = tiny.make_sentencepiece_folder(folder)
    else:
        tiny.make_byte_level_folder(folder)
    return Processor(folder, load_config(folder))


def marked(processor, text, *places, before=(), max_response=200):
    """What the marked tokens of each span of the text say."""
    turns = (*before, Turn("assistant", text))
    response = Response(turns, spans=tuple(Span(*place) for place in places))
    record = Record("r", (IMAGE,), (Turn("user", "what is this ?"),), (response,))
    (made,) = tokenize(record, processor, 200, max_response).responses
    ids = made.ids.tolist()
    return [said(processor, ids[first:end]) for first, end in made.span_tokens], made


def said(processor, ids):
    """The text of tokens, where the tokenizer has no decoder too."""
    if not processor.tokenizer.backend_tokenizer.normalizer:
        return processor.decode(ids).strip()
    return "".join(processor.tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ").strip()


def place(text, part):
    return text.index(part), text.index(part) + len(part)


@pytest.mark.parametrize("part", ["a red", "red star", "green", "ring", TEXT])
def test_spans_of_words(processor, part):
    (found,), made = marked(processor, TEXT, place(TEXT, part))
    assert found == part
    assert made.loss_mask.all()


def test_a_token_that_overlaps_a_span_is_marked_and_spaces_do_not_count(processor):
    start, end = place(TEXT, "red star")
    (found,), _ = marked(processor, TEXT, (start + 1, end))
    assert found in ("red star", "ed star")  # as the tokens are cut
    with_spaces = (start - 1, end + 1)
    assert marked(processor, TEXT, with_spaces)[0] == ["red star"]


def test_several_spans_and_one_that_was_cut_off(processor):
    parts = [place(TEXT, "red"), place(TEXT, "ring")]
    found, made = marked(processor, TEXT, *parts)
    assert found == ["red", "ring"]
    found, _ = marked(processor, TEXT, *parts, max_response=made.span_tokens[1][0])
    assert found == ["red", ""]


def test_spans_are_of_the_last_turn(processor):
    """An earlier answer and a question say the same."""
    before = (Turn("assistant", TEXT), Turn("user", TEXT))
    (found,), made = marked(processor, TEXT, place(TEXT, "green ring"), before=before)
    assert found == "green ring"
    first, end = made.span_tokens[0]
    assert said(processor, made.ids[end:].tolist()).strip() in ("", "</s>")
    assert made.loss_mask[first:end].all()
    assert not made.loss_mask.all()


def test_characters_of_several_bytes(processor):
    text = "a ré星 ring"
    (found,), made = marked(processor, text, place(text, "星"))
    if processor.tokenizer.decode(made.ids[:-1].tolist()).strip() == text:
        assert found == "星"
        first, end = made.span_tokens[0]
        assert end - first > 1


def test_white_space_around_the_text(processor):
    text = f"  {TEXT} "
    assert marked(processor, text, place(text, "red star"))[0] == ["red star"]


def test_a_template_that_changes_the_text(tiny_folder, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        CHAT_TEMPLATE.replace("part['text'] -", "part['text'] | replace('red', 'blue') -")
    )
    processor = Processor(folder, load_config(folder))
    with pytest.raises(UnusableRow, match="changes the text") as error:
        marked(processor, TEXT, (0, 3))
    assert error.value.reason == "span_not_found"
    assert np.array_equal(marked(processor, "a ring")[1].span_tokens, ())
