"""What can be said of an answer before it is whole, and what single tokens say."""

import types

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("uvicorn", reason="needs pip install 'mmpo_jax[serve]'")

from mmpo_jax.serving.texts import AnswerText, TokenTexts

TEXT = "A café ☕ in the 雨, and its owner's cat 🐈. A café."


def byte_level():
    """A tokenizer of bytes, as Qwen's and LLaMA-3's are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    vocabulary["Ġc"] = len(vocabulary)
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "c")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def sentence_piece():
    """A tokenizer of pieces with blanks and of bytes, as LLaMA-2's is."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁c", *"Acafintheds,.'"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[("▁", "c")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def processor_of(tokenizer):
    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    return types.SimpleNamespace(tokenizer=tokenizer, decode=decode)


KINDS = {"byte level": byte_level(), "sentence piece": sentence_piece()}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_bytes_of_their_text(kind):
    tokenizer = KINDS[kind]
    texts = TokenTexts(processor_of(tokenizer))
    ids = tokenizer(TEXT)["input_ids"]
    assert b"".join(texts.bytes_of(token) for token in ids).decode() == TEXT
    assert texts.text_of(tokenizer.convert_tokens_to_ids("Ġc" if kind[0] == "b" else "▁c")) == " c"
    assert texts.text_of(tokenizer.eos_token_id) == "<eos>"
    assert texts.text_of(10**6) == ""


@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.integers(1, 9), min_size=1, max_size=60),
    st.sampled_from([(), ("☕ in",), ("cat 🐈.", "owner"), ("café.",), ("never",), (" A", "A c")]),
)
def test_what_is_said_adds_up_to_the_answer(kind, sizes, stops):
    """However the tokens come; nothing that is said is taken back, nor any of a stop said."""
    tokenizer = KINDS[kind]
    ids = np.array(tokenizer(TEXT)["input_ids"], np.int32)
    answer, said, at = AnswerText(processor_of(tokenizer), stops), [], 0
    while at < len(ids) and not answer.is_stopped:
        size = sizes[len(said) % len(sizes)]
        said.append(answer.add(ids[at : at + size], is_last=at + size >= len(ids)))
        at += size
    found = [place for stop in stops if (place := TEXT.find(stop)) >= 0]
    expected = TEXT[: min(found)] if found else TEXT
    assert "".join(said) == answer.text == expected
    assert answer.is_stopped == bool(found)
    assert all("�" not in part for part in said)
    if found:  # no token behind the stop counts
        whole = tokenizer.decode(answer.ids)
        assert any(stop in whole for stop in stops)
        assert not any(stop in tokenizer.decode(answer.ids[:-1]) for stop in stops)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stops", [(), (" A",)])
def test_an_answer_that_is_said_whole_is_decoded_once(kind, stops, monkeypatch):
    """But where a stop may end it."""
    processor, decoded = processor_of(KINDS[kind]), []
    decode = processor.decode
    monkeypatch.setattr(processor, "decode", lambda ids: decoded.append(1) or decode(ids))
    ids = np.array(KINDS[kind](TEXT)["input_ids"], np.int32)
    answer = AnswerText(processor, stops, is_streamed=False)
    streamed = AnswerText(processor_of(KINDS[kind]), stops)
    for place in range(len(ids)):
        for one in (answer, streamed):
            if not one.is_stopped:
                one.add(ids[place : place + 1], is_last=place == len(ids) - 1)
    assert (answer.text, answer.ids) == (streamed.text, streamed.ids)
    assert (len(decoded) == 1) == (not stops)
