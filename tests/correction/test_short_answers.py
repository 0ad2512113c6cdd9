"""Short answers by rule: both answers in one wording, nothing where the rule could be wrong."""

import pytest

from mmpo_jax.correction.codebook import load_codebook
from mmpo_jax.correction.corrections import Case
from mmpo_jax.correction.short_answers import SHORT_ANSWER, short_answer_error, words_of

BOOK = load_codebook(None)


def found(chosen, rejected, question="Who wrote it?", max_words=12, seed=0, name="a"):
    case = Case(name, question, chosen, rejected)
    return short_answer_error(case, BOOK, max_words, seed)


def test_one_wording_for_both():
    (error,) = found("Ann Lee", " Bob Ray. ").errors
    assert (error.kind, error.wrong) == (SHORT_ANSWER, "Bob Ray.")
    assert error.yes.replace("Ann Lee", "Bob Ray.") == error.no
    assert "Who wrote it?" in error.yes and "Ann Lee" in error.yes


def test_wordings_are_drawn_by_seed_and_row():
    wordings = {
        found("Ann", "Bob", seed=seed, name=str(name)).errors[0].yes
        for seed in range(3)
        for name in range(10)
    }
    assert len(wordings) == len(BOOK.short_answers)
    assert found("Ann", "Bob", seed=5) == found("Ann", "Bob", seed=5)


def test_braces_and_instructions():
    (error,) = found(
        "{question}", "x {answer}", "What?\nAnswer the question using a single word or phrase."
    ).errors
    assert "{question}" in error.yes and "x {answer}" in error.no
    assert "single word" not in error.yes and "What?" in error.yes


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("The cat", "a cat.", "same_responses"),
        ("2", "two", "same_responses"),
        ("none", "0", "same_responses"),
        ("1,000", "1000", "same_responses"),
        ("don't", "dont", "same_responses"),
        ("red", "dark red", "alike_answers"),
        ("yes, it is", "Yes", "alike_answers"),
        ("left of it", "it left", "alike_answers"),
        ("red", " ", "empty_response"),
        ("...", "red", "empty_response"),
        ("red", "a b c d e f g h i j k l m", "long_answer"),
    ],
)
def test_nothing_is_asked_where_it_could_be_wrong(chosen, rejected, reason):
    one = found(chosen, rejected)
    assert (one.errors, one.reason) == ((), reason)
    assert one.detail


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("yes", "no"), ("A", "B"), ("3", "30"), ("7:10", "7:15")]
)
def test_what_differs_is_asked(chosen, rejected):
    assert len(found(chosen, rejected).errors) == 1


def test_the_limit_of_words():
    assert found("a b", "c d", max_words=2).errors
    assert found("a b", "c d e", max_words=2).reason == "long_answer"


def test_a_codebook_without_wordings():
    bare = BOOK.model_copy(update={"short_answers": ()})
    assert short_answer_error(Case("a", "q", "x", "y"), bare, 9, 0).reason == "no_error"


def test_words():
    assert words_of("The Lord's 3 rings, an elf!") == ["lords", "3", "rings", "elf"]
    assert words_of("A.") == ["a"]
