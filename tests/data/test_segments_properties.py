"""Spans and segments of any texts, against readers that go character by character."""

import difflib

from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.data.segments import changed_segments, covered_tokens

PIECES = st.sampled_from(["a", "ab", " a", "  ba", " ", "\n", "a b", " a "])


@st.composite
def tokenized(draw):
    """A text, the tokens that make it up but for some that are lost, and a span of it."""
    pieces = draw(st.lists(st.tuples(PIECES, st.booleans()), min_size=1, max_size=6))
    text, tokens = "", []
    for piece, lost in pieces:
        if not lost:
            tokens.append((len(text), len(text) + len(piece)))
        text += piece
    start = draw(st.integers(0, len(text) - 1))
    return text, tokens, start, draw(st.integers(start + 1, len(text)))


def counted(text, token):
    """The characters of a token that count: not space in front of a word."""
    places = list(range(*token))
    word = next((n for n, place in enumerate(places) if not text[place].isspace()), 0)
    return places[word:]


@given(tokenized())
def test_tokens_with_a_character_of_the_span(drawn):
    text, tokens, start, end = drawn
    inside = [
        number
        for number, token in enumerate(tokens)
        if any(start <= place < end for place in counted(text, token))
    ]
    first, last = covered_tokens(text, tokens, start, end)
    if inside:
        assert (first, last) == (min(inside), max(inside) + 1)
    else:
        assert first == last == 0


SEQUENCES = st.lists(st.sampled_from("abcd"), max_size=12)


@given(SEQUENCES, SEQUENCES)
def test_segments_are_what_difflib_replaces(ours, theirs):
    opcodes = difflib.SequenceMatcher(None, ours, theirs).get_opcodes()
    replaced = [code for code in opcodes if code[0] == "replace"]
    mine, others = changed_segments(ours, theirs, min_match=1)
    assert mine == [(a, b) for _, a, b, _, _ in replaced]
    assert others == [(a, b) for _, _, _, a, b in replaced]


@given(SEQUENCES, SEQUENCES, st.integers(2, 5))
def test_short_matches_join_what_is_around_them(ours, theirs, min_match):
    opcodes = difflib.SequenceMatcher(None, ours, theirs).get_opcodes()
    long = [code for code in opcodes if code[0] == "equal" and code[2] - code[1] >= min_match]
    mine, others = changed_segments(ours, theirs, min_match)
    assert len(mine) == len(others)
    ends = len(ours), len(theirs)
    for (start, end), (first, last) in zip(mine, others, strict=True):
        assert start < end
        assert first < last
        # Between two long matches, and all of what lies there.
        before = max([(a, b) for _, _, a, _, b in long if a <= start], default=(0, 0))
        after = min([(a, b) for _, a, _, b, _ in long if a >= end], default=ends)
        assert (before, after) == ((start, first), (end, last))
    between = [(0, 0), *((code[2], code[4]) for code in long)]
    following = [*((code[1], code[3]) for code in long), ends]
    changed = [a < c and b < d for (a, b), (c, d) in zip(between, following, strict=True)]
    assert sum(changed) == len(mine)
