"""Replies of splitters are read strictly, and prompts are filled once."""

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.core.prompts import fill
from mmpo_jax.feedback import split_prompts
from mmpo_jax.feedback.split_prompts import as_list, read_claims, read_list
from mmpo_jax.feedback.text_model import UnreadableReply

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), max_size=5)
LINES = st.text(st.characters(exclude_categories=("Cc", "Cs", "Z")), min_size=1)


def as_json(pairs, **options):
    claims = [{"claim": claim, "question": question} for claim, question in pairs]
    return json.dumps({"claims": claims}, **options)


def reason(read, reply):
    with pytest.raises(UnreadableReply) as caught:
        read(reply)
    assert caught.value.detail
    return caught.value.reason


class TestClaims:
    @given(PAIRS, st.booleans(), st.sampled_from([None, 1]))
    def test_what_is_written_is_read(self, pairs, ascii_only, indent):
        reply = as_json(pairs, ensure_ascii=ascii_only, indent=indent)
        expected = [(claim.strip(), question.strip()) for claim, question in pairs]
        assert read_claims(reply) == expected
        assert read_claims(f"\n {reply}\n") == expected

    @pytest.mark.parametrize(
        "fenced",
        [
            "```json\n{}\n```",
            "```\n{}\n```",
            "```JSON\n\n{}\n\n```\n",
            "```json {}```",
            "Here it is:\n```json\n{}\n```\nIs that what you want?",
        ],
    )
    def test_a_code_fence(self, fenced):
        reply = as_json([("A bus is red.", "Is a bus red?")], indent=1)
        assert read_claims(fenced.replace("{}", reply)) == [("A bus is red.", "Is a bus red?")]

    def test_fences_inside_a_claim(self):
        pairs = [("The sign says ```no```.", "Does the sign say ```no```?")]
        assert read_claims(as_json(pairs)) == pairs
        assert reason(read_claims, f"```json\n{as_json(pairs)}\n```") == "no_json"

    def test_two_fences_are_two_answers(self):
        fence = f"```json\n{as_json([('a', 'b')])}\n```"
        assert reason(read_claims, f"{fence}\nor\n{fence}") == "no_json"
        assert reason(read_claims, f"```markdown\n{fence}\n```") == "no_json"

    @pytest.mark.parametrize(
        ("reply", "why"),
        [
            ("", "no_json"),
            ("I see a bus.", "no_json"),
            (as_json([("a", "b")]) + " I hope this helps!", "no_json"),
            (as_json([("a", "b")])[:-3], "no_json"),
            ("Sure! " + as_json([("a", "b")]), "no_json"),
            ("{'claims': []}", "no_json"),
            ("[" * 100_000, "no_json"),
            ('{"claims": ' + "9" * 10_000 + "}", "no_json"),
            ("[]", "no_claims_key"),
            ("null", "no_claims_key"),
            ('"claims"', "no_claims_key"),
            ("{}", "no_claims_key"),
            ('{"claims": [], "note": "none"}', "no_claims_key"),
            ('{"claims": null}', "no_claims_key"),
            ('{"claims": {"claim": "a", "question": "b"}}', "no_claims_key"),
            ('{"claims": ["a"]}', "bad_claim"),
            ('{"claims": [["a", "b"]]}', "bad_claim"),
            ('{"claims": [{"claim": "a"}]}', "bad_claim"),
            ('{"claims": [{"claim": "a", "question": "b", "sure": true}]}', "bad_claim"),
            ('{"claims": [{"claim": "a", "question": 1}]}', "bad_claim"),
            ('{"claims": [{"claim": " ", "question": "b"}]}', "bad_claim"),
            ('{"claims": [{"claim": "a", "question": null}]}', "bad_claim"),
            ('{"claims": [{"claim": "\\ud83d", "question": "b"}]}', "bad_claim"),
        ],
    )
    def test_anything_else_is_refused(self, reply, why):
        assert reason(read_claims, reply) == why

    def test_an_empty_list_is_a_reply(self):
        assert read_claims('{"claims": []}') == []

    def test_half_characters_that_make_one(self):
        reply = '{"claims": [{"claim": "\\ud83d\\ude8c", "question": "b"}]}'
        assert read_claims(reply) == [("\N{BUS}", "b")]

    @pytest.mark.parametrize("beginning", ["```", "```json\n", "{", '{"claims": ['])
    def test_a_reply_that_never_ends_is_read_at_once(self, beginning):
        """Models that are held to JSON may write blanks up to their limit."""
        for blank in "\n \t":
            began = time.perf_counter()
            assert reason(read_claims, beginning + blank * 100_000) == "no_json"
            assert time.perf_counter() - began < 1

    @given(st.text())
    def test_any_text_is_read_or_refused(self, reply):
        for read in (read_claims, read_list):
            with contextlib.suppress(UnreadableReply):
                assert isinstance(read(reply), list)


class TestLists:
    @pytest.mark.parametrize("mark", ["-", "*", "\N{BULLET}", "\N{EN DASH}", "1.", "12)", "  -"])
    def test_marks(self, mark):
        assert read_list(f"### Facts:\n{mark} A bus.\n{mark}  A car.\n") == ["A bus.", "A car."]

    def test_without_a_heading(self):
        assert read_list("\n- a\n\n- b") == ["a", "b"]

    def test_wrapped_lines(self):
        assert read_list("### Facts:\n- A bus that\n  is red.\n- A car.") == [
            "A bus that is red.",
            "A car.",
        ]

    def test_talk_in_front_of_a_heading(self):
        assert read_list("Sure, here are - I think - the facts\n\n### Facts:\n- a") == ["a"]

    def test_only_the_first_heading_counts(self):
        assert read_list("### Facts:\n- a\n\n### Modified sentences:\n- Is it a?") == ["a"]

    def test_a_heading_is_a_line_of_its_own(self):
        assert read_list("### Facts:\n- The sign says ### Hall 3.\n- b") == [
            "The sign says ### Hall 3.",
            "b",
        ]

    def test_numbers_and_dashes_within_items(self):
        items = ["A 2-door car - red.", "1.5 m of rope", "3. floor", "**bold** *words*", "-5 C"]
        assert read_list("\n".join(f"- {item}" for item in items)) == items

    @pytest.mark.parametrize(
        "reply",
        [
            "",
            "\n \n",
            "### Facts:\n",
            "A bus. A car.",
            "Here are the facts:\n- a",
            "### Facts:\nThere are none.",
            "- a\n- \n",
            "- a\n\nI hope this helps!",
            "-a\n-b",
            "**a**\n**b**",
        ],
    )
    def test_what_is_no_list(self, reply):
        assert reason(read_list, reply) == "no_list"

    @given(st.lists(st.lists(LINES, min_size=1, max_size=3).map(" ".join), min_size=1))
    def test_what_is_listed_is_read(self, items):
        assert read_list(f"### Facts:\n{as_list(items)}") == items

    def test_a_huge_list(self):
        items = [f"fact {number}" for number in range(20_000)]
        assert read_list(as_list(items)) == items


class TestFilling:
    def test_braces_in_what_is_filled_in(self):
        filled = fill("{question} / {answer} / {other}", question="{answer}", answer="{question}{}")
        assert filled == "{answer} / {question}{} / {other}"

    def test_backslashes_are_letters(self):
        assert fill("{answer}", answer=r"\1 \g<0> \n") == r"\1 \g<0> \n"

    @given(st.text(), st.text())
    def test_the_built_in_prompts_hold_both_to_the_letter(self, question, answer):
        for prompt in (split_prompts.CLAIMS_PROMPT, split_prompts.FACTS_PROMPT):
            filled = fill(prompt, question=question, answer=answer)
            assert filled.endswith(f"Question: {question}\nAnswer: {answer}")
            start = prompt.index("{question}")
            assert filled[:start] == prompt[:start]

    def test_facts_of_several_lines_become_one(self):
        assert as_list(["a\n- b", " c "]) == "- a - b\n- c"
