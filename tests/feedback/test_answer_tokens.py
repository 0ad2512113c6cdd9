"""Yes and no in tokens: what the model's own template begins such an answer with, by family."""

import pytest
from helpers import tiny

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Turn
from mmpo_jax.feedback.labeler import answer_tokens

QUESTION = Turn("user", "Is it red?")


def first_ids(processor, word):
    """Token ids of an answer that is written behind the prompt, as generation goes on from it."""
    asked = processor.render([QUESTION], True)
    said = processor.render([QUESTION, Turn("assistant", word)], False)
    assert said.startswith(asked)
    prompt, whole = processor.encode(asked), processor.encode(said)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    # A token of the whole text reaches over the end of the prompt: that is none to generate.
    return processor.tokenizer.encode(said[len(asked) :], add_special_tokens=False)


def check(processor):
    lead, yes, no = answer_tokens(processor)
    answers = {word: first_ids(processor, word) for word in ("yes", "Yes", "no", "No")}
    for word, ids in answers.items():
        assert tuple(ids[: len(lead)]) == lead
        first = ids[len(lead)]
        assert first in (yes if word.lower() == "yes" else no), word
        assert first not in (no if word.lower() == "yes" else yes), word
    assert {ids[len(lead)] for ids in answers.values()} == {*yes, *no}
    return lead, yes, no


@pytest.mark.parametrize(
    "name",
    [
        "smollm2",
        "llama3",
        "qwen3",
        "llava",
        "llava_next",
        "llava_onevision",
        "internvl",
        "qwen2_5_vl",
        "qwen3_vl",
    ],
)
def test_published_templates(name, tmp_path):
    pytest.importorskip("trl")
    from helpers.kinds import KINDS, make_checkpoint

    make_checkpoint(tmp_path / name, KINDS[name])
    processor = Processor(tmp_path / name, load_config(tmp_path / name))
    _, yes, no = check(processor)
    words = {processor.tokenizer.decode([token]).strip() for token in (*yes, *no)}
    assert words == {"yes", "Yes", "no", "No"}


def test_sentencepiece(tmp_path, monkeypatch):
    """A space, written as part of the token, stands in front of answers."""
    monkeypatch.setattr(tiny, "CORPUS", tiny.CORPUS + " yes Yes no No" * 20)
    folder = tiny.make_sentencepiece_folder(tmp_path / "llava")
    processor = Processor(folder, load_config(folder))
    lead, *answers = check(processor)
    tokens = [processor.tokenizer.convert_ids_to_tokens(ids) for ids in answers]
    assert lead == () and [set(of) for of in tokens] == [
        {"\u2581yes", "\u2581Yes"},
        {"\u2581no", "\u2581No"},
    ]


def test_byte_level(tmp_path):
    folder = tiny.make_byte_level_folder(tmp_path / "llava")
    processor = Processor(folder, load_config(folder))
    check(processor)
