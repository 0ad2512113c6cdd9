"""Splitters: what they ask, what they ask again, and what becomes of replies nobody can read."""

import json

import pytest
from helpers.judged import Scripted

from mmpo_jax.feedback.judge import EMPTY
from mmpo_jax.feedback.split_prompts import CLAIMS_SCHEMA
from mmpo_jax.feedback.splitters import Claim, Division, ModelSplitter, RlaifVSplitter, SplitItem
from mmpo_jax.feedback.text_model import TOO_LONG, TRIAL, UNFINISHED, Reply
from mmpo_jax.recipes.feedback import CheckpointSplitting

ITEMS = [SplitItem(f"p/{n}", "What is it?", text) for n, text in enumerate(["a bus", "a car", "x"])]


def answer_of(text):
    return text.rpartition("Answer: ")[2]


def claims(text, attempt=0):
    """One claim for each word of the answer."""
    words = answer_of(text).split()
    return json.dumps({"claims": [{"claim": w, "question": f"{w}?"} for w in words]})


def splitter(says, **options):
    model = Scripted(says)
    return ModelSplitter(model, CheckpointSplitting(**options), "key"), model


class TestOneModel:
    def test_in_order_with_the_schema(self):
        split, model = splitter(claims)
        assert split.divide(ITEMS) == [
            Division((Claim("a", "a?"), Claim("bus", "bus?"))),
            Division((Claim("a", "a?"), Claim("car", "car?"))),
            Division((Claim("x", "x?"),)),
        ]
        assert model.schemas == [CLAIMS_SCHEMA] and not model.rejected
        assert [ask.id for ask in model.rounds[0]] == ["p/0", "p/1", "p/2"]
        assert "Question: What is it?" in model.rounds[0][0].text

    def test_no_claims_is_no_failure(self):
        split, _ = splitter(lambda text, attempt: '{"claims": []}')
        assert split.divide(ITEMS[:1]) == [Division(())]

    def test_only_what_cannot_be_read_is_asked_again(self):
        def says(text, attempt):
            return "hm" if answer_of(text) == "a car" and attempt < 2 else claims(text)

        split, model = splitter(says)
        divided = split.divide(ITEMS)
        assert [len(division.claims) for division in divided] == [2, 2, 1]
        assert [[(ask.id, ask.attempt) for ask in asked] for asked in model.rounds] == [
            [("p/0", 0), ("p/1", 0), ("p/2", 0)],
            [("p/1", 1)],
            [("p/1", 2)],
        ]
        assert model.rejected == [("p/1", 0), ("p/1", 1)]

    @pytest.mark.parametrize("able", [True, False])
    def test_the_first_are_asked_before_the_rest(self, able, caplog):
        """Replies belong to their own responses; a model that cannot do it is told of early."""
        items = [SplitItem(f"p/{n}", "What?", f"word{n}") for n in range(TRIAL + 3)]
        first = {item.response for item in items[:TRIAL]}

        def says(text, attempt):
            return "Sure!" if not able and answer_of(text) in first else claims(text)

        split, model = splitter(says, attempts=2)
        divided = split.divide(items)
        assert [len(asked) for asked in model.rounds] == [TRIAL, *[TRIAL] * (not able), 3]
        for item, division in zip(items, divided, strict=True):
            readable = able or item.response not in first
            assert [claim.text for claim in division.claims] == [item.response] * readable
        told = (
            f"none of the first {TRIAL} replies can be read (no_json {TRIAL}); the first: 'Sure!'"
        )
        assert caplog.messages == [told] * (not able)

    @pytest.mark.parametrize("attempts", [1, 2, 4])
    def test_as_often_as_attempts_say(self, attempts):
        split, model = splitter(lambda text, attempt: f"hm {attempt}", attempts=attempts)
        (division,) = split.divide(ITEMS[:1])
        assert division == Division((), failure="no_json", raw=f"hm {attempts - 1}")
        assert model.rejected == [("p/0", attempt) for attempt in range(attempts)]

    def test_a_reply_that_ended_at_its_limit_gets_twice_the_room(self):
        def says(text, attempt):
            return claims(text) if attempt == 2 else Reply('{"claims": [', UNFINISHED)

        split, model = splitter(says, max_new_tokens=100)
        assert split.divide(ITEMS[:1])[0].failure is None
        assert [asked[0].max_new_tokens for asked in model.rounds] == [100, 200, 400]

    def test_other_failures_get_the_same_room(self):
        split, model = splitter(lambda text, attempt: Reply(None, "timed_out", "no answer"))
        (division,) = split.divide(ITEMS[:1])
        assert (division.failure, division.raw) == ("timed_out", "no answer")
        assert [asked[0].max_new_tokens for asked in model.rounds] == [1024] * 3

    def test_final_failures_are_not_asked_again(self):
        split, model = splitter(lambda text, attempt: Reply(None, TOO_LONG, "9 tokens", final=True))
        (division,) = split.divide(ITEMS[:1])
        assert (division.failure, division.raw) == (TOO_LONG, "9 tokens")
        assert len(model.rounds) == 1

    @pytest.mark.parametrize("text", ["", " \n\t"])
    def test_nobody_is_asked_about_nothing(self, text):
        split, model = splitter(claims)
        empty = SplitItem("p/9", "?", text)
        divided = split.divide([empty, *ITEMS[:1], empty])
        assert [division.failure for division in divided] == [EMPTY, None, EMPTY]
        assert [ask.id for asked in model.rounds for ask in asked] == ["p/0"]
        assert split.divide([empty]) == [Division((), failure=EMPTY)]

    def test_long_answers_are_asked_about_whole(self):
        long = " ".join(f"word{n}" for n in range(20_000))
        split, model = splitter(claims)
        (division,) = split.divide([SplitItem("p/0", "?", long)])
        assert model.rounds[0][0].text.endswith(long)
        assert [claim.text for claim in division.claims] == long.split()

    def test_a_prompt_of_the_users(self):
        split, model = splitter(claims, prompt="{question}|{answer} {x}|Answer: {answer}")
        split.divide(ITEMS[:1])
        assert model.rounds[0][0].text == "What is it?|a bus {x}|Answer: a bus"

    def test_the_key_has_what_replies_depend_on(self):
        def key(**options):
            return json.dumps(splitter(claims, **options)[0].key)

        others = {
            key(**options)
            for options in (
                {"temperature": 0.5},
                {"top_p": 0.5},
                {"max_new_tokens": 7},
                {"attempts": 2},
                {"prompt": "{question}{answer}"},
            )
        }
        assert len(others | {key()}) == 6
        assert key(batch_size=3) == key()


def listed(text, attempt=0):
    return "### Facts:\n" + "\n".join(f"- {word}" for word in answer_of(text).split())


def asked_back(text, attempt=0):
    facts = text.partition("### Sentences:\n")[2].splitlines()
    return "### Modified sentences:\n" + "\n".join(f"{fact}?" for fact in facts)


def two_models(facts=listed, questions=asked_back, **options):
    first, second = Scripted(facts), Scripted(questions)
    section = CheckpointSplitting(style="rlaif_v", **options)
    return RlaifVSplitter(first, second, section, "key"), first, second


class TestTwoModels:
    def test_facts_and_then_questions(self):
        split, first, second = two_models()
        assert split.divide(ITEMS[:2]) == [
            Division((Claim("a", "a?"), Claim("bus", "bus?"))),
            Division((Claim("a", "a?"), Claim("car", "car?"))),
        ]
        assert first.schemas == second.schemas == [None]
        assert second.rounds[0][0].text.endswith("### Sentences:\n- a\n- bus")
        assert second.rounds[0][0].id == "p/0/questions"

    @pytest.mark.parametrize("extra", [-1, 1])
    def test_counts_that_differ_are_asked_again_and_never_put_together(self, extra):
        def questions(text, attempt):
            lines = asked_back(text).splitlines()
            if answer_of(text).endswith("car") and attempt < 3:
                return "\n".join(lines[:-1] if extra < 0 else [*lines, "- more?"])
            return "\n".join(lines)

        split, first, second = two_models(questions=questions)
        divided = split.divide(ITEMS)
        assert [division.failure for division in divided] == [None, "counts_differ", None]
        assert divided[1].claims == () and divided[1].raw.startswith("### Modified sentences:")
        assert [len(asked) for asked in second.rounds] == [3, 1, 1]
        assert len(first.rounds) == 1
        split, _, second = two_models(questions=questions, attempts=4)
        assert [division.failure for division in split.divide(ITEMS)] == [None] * 3

    def test_no_questions_are_asked_for_facts_that_nobody_can_read(self):
        def facts(text, attempt):
            return "none" if answer_of(text) == "a bus" else listed(text)

        split, first, second = two_models(facts=facts)
        divided = split.divide(ITEMS)
        assert [division.failure for division in divided] == ["no_list", None, None]
        assert [ask.id for ask in second.rounds[0]] == ["p/1/questions", "p/2/questions"]
        assert first.rejected == [("p/0", attempt) for attempt in range(3)]

    def test_empty_responses(self):
        split, _, second = two_models()
        divided = split.divide([SplitItem("p/0", "?", " "), ITEMS[1], SplitItem("p/2", "?", "")])
        assert [division.failure for division in divided] == [EMPTY, None, EMPTY]
        assert [len(asked) for asked in second.rounds] == [1]
        assert split.divide([]) == []
