"""Where a text's first sentence ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.feedback.sentences import first_sentence


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A dog. A cat.", "A dog."),
        (" A dog sits.", " A dog sits."),
        ("A dog", None),
        ("", None),
        (" \n", None),
        ("Is it red? Yes.", "Is it red?"),
        ("What!? No", "What!?"),
        ('It says "stop." Then', 'It says "stop."'),
        ("It is 3.5 metres tall. Tall", "It is 3.5 metres tall."),
        ("Mr. Hill and Dr. Low. They", "Mr. Hill and Dr. Low."),
        ("There is fruit, e.g. pears. And", "There is fruit, e.g. pears."),
        ("1. A dog.\n2. A cat.", "1. A dog."),
        ("There are 12. Yes", "There are 12."),
        ("\n\nA dog. A", "\n\nA dog."),
        ("A list\n- dog", "A list\n"),
        ("\u4e00\u53ea\u72d7\u3002\u4e00\u53ea\u732b\u3002", "\u4e00\u53ea\u72d7\u3002"),
        ("there is a red star .", "there is a red star ."),
        ("The U.S. flag is red. It", "The U.S. flag is red."),
        ("The U.S. Army is here. It", "The U.S. Army is here."),
        ("Room No. 5 is shut. It", "Room No. 5 is shut."),
        ("No. The dog is red.", "No."),
        ("At 5 p.m. the shop shuts. It", "At 5 p.m. the shop shuts."),
        ("J. R. R. Hill reads. He", "J. R. R. Hill reads."),
        ('It says "Stop!" and "Go!" twice. It', 'It says "Stop!" and "Go!" twice.'),
        ('A dog. "Hi," it says.', "A dog."),
        ("A dog. - a cat", "A dog."),
        ("It has 3. 4 are red.", "It has 3."),
        ("A dog.\nand a cat", "A dog."),
        ("a red star . a ring .", "a red star ."),
    ],
)
def test_prose(text, first):
    assert first_sentence(text) == first


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("It costs 3.", None),
        ("It costs 3. ", None),
        ("It costs 3.\n", "It costs 3."),
        ("A dog. It costs 3.", "A dog."),
        ("\u4e00\u53ea\u72d7\u3002", "\u4e00\u53ea\u72d7\u3002"),
    ],
)
def test_a_text_that_was_cut_ends_no_sentence(text, first):
    assert first_sentence(text, finished=False) == first


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a red star , two rings .", "a red star ,"),
        (" two rings .", " two rings ."),
        (" , a star .", " ,"),
        ("a star", None),
    ],
)
def test_an_end_of_the_users(text, first):
    assert first_sentence(text, r" [,.]") == first


@given(st.text(alphabet="aM r1.!?\n\"'\u3002", max_size=40))
def test_sentences_make_up_the_text(text):
    said, rest = "", text
    while (sentence := first_sentence(rest)) is not None:
        assert sentence.strip() and rest.startswith(sentence)
        said, rest = said + sentence, rest[len(sentence) :]
    assert said + rest == text
