"""A served labeler: where its answers are read, and what is no answer."""

import contextlib
import math

import pytest
from helpers.chat_server import ChatTestServer, error, images, question, reply

from mmpo_jax.chat.client import ChatClient
from mmpo_jax.chat.pacing import Backoff
from mmpo_jax.chat.replies import NO_LOG_PROB, ChatReply
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.data.records import ImageRef
from mmpo_jax.feedback.chat_labeler import (
    NEITHER,
    PROBED,
    TIE,
    TOP,
    ChatLabeler,
    first_word,
    read_logprobs,
)
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.feedback import ChatLabeling


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:
        yield lambda script: stack.enter_context(ChatTestServer(script))


@pytest.fixture
def labeler_of(tmp_path):
    """Makes labelers of servers."""
    with contextlib.ExitStack() as stack:

        def labeler_of(server, max_concurrent=4, **options):
            address = {"url": server.url, "model": "judge", "max_retries": 1}
            section = ChatServer(**address, max_concurrent=max_concurrent)
            client = ChatClient(section, tmp_path / "journal", Backoff(0.001, 0.002))
            labeling = ChatLabeling(**address, **options)
            return ChatLabeler(stack.enter_context(client), labeling)

        yield labeler_of


def image(number=0):
    return ImageRef(f"image-{number}", png_bytes(sample_scene("test", 0, number), 24))


def items(*questions):
    return [("a", (image(),), questions)]


def top(**tokens):
    return [(token, math.log(p)) for token, p in tokens.items()]


def read(*tokens):
    return read_logprobs(ChatReply(("",), ("length",), (tuple(tokens),), None))


def close(answer, p_yes, p_no, where="logprobs"):
    assert (answer.read, answer.failure) == (where, None)
    assert answer[:2] == pytest.approx((p_yes, p_no), abs=1e-9)


class TestLogProbs:
    def test_spellings_are_added_up(self):
        spelled = ["yes", "Yes", " yes", "YES", "\u2581Yes", "\u0120yes", "yes\n"]
        tokens = [(token, math.log(0.1)) for token in spelled]
        answer = read(*tokens, ("No", math.log(0.2)), ("\u2581no", math.log(0.05)))
        close(answer, 0.7, 0.25)

    def test_other_words_are_neither(self):
        tokens = [("yesterday", -1.0), ("not", -2.0), ("know", -2.0), ("y", -3.0), ("", -3.0)]
        assert read(*tokens).failure == NEITHER
        assert math.isnan(read(*tokens).p_yes) and math.isnan(read(*tokens).p_no)

    def test_of_one_that_is_not_told_as_much_as_can_be(self):
        # Less than the least likely that is told ...
        close(read(*top(Yes=0.6, The=0.2, It=0.1)), 0.6, 0.1)
        # ... and no more than is left.
        close(read(*top(no=0.8, The=0.15)), 0.05, 0.8)
        close(read(("yes", 0.0)), 1.0, 0.0)

    def test_log_probs_that_are_none(self):
        """-9999 stands for a token that the server has no number of."""
        close(read(*top(no=0.5, The=0.2), ("yes", NO_LOG_PROB)), 0.2, 0.5)
        assert read(("yes", NO_LOG_PROB), ("no", NO_LOG_PROB)).failure == NEITHER

    def test_log_probs_above_zero_are_rounding(self):
        close(read(("yes", 1e-4), ("no", -20.0)), 1.0, math.exp(-20))

    def test_one_token_with_twenty_others_is_asked_for(self, serve, labeler_of):
        server = serve(lambda body, seen: reply(body, "Yes", top(Yes=0.75, No=0.25)))
        ((answer,),) = labeler_of(server).answer(items("red?"))
        close(answer, 0.75, 0.25)
        (body,) = server.bodies
        assert (body["max_tokens"], body["temperature"]) == (1, 0.0)
        assert (body["logprobs"], body["top_logprobs"]) == (True, TOP)
        ((kind, data),) = images(body)
        assert (kind, data) == ("image/png", image().read())

    def test_neither_is_asked_again_and_then_fails(self, serve, labeler_of):
        says = {"red?": 2, "blue?": 9}

        def script(body, seen):
            if seen < says.get(question(body), 0):
                return reply(body, "The", top(The=0.9, A=0.1))
            return reply(body, "no", top(no=0.9, yes=0.1))

        server = serve(script)
        ((red, blue, green),) = labeler_of(server, attempts=3).answer(
            items("red?", "blue?", "green?")
        )
        close(red, 0.1, 0.9)
        close(green, 0.1, 0.9)
        assert blue.failure == NEITHER and math.isnan(blue.p_yes)
        assert server.questions == {"red?": 3, "blue?": 3, "green?": 1}

    def test_a_server_without_any_fails_where_they_are_asked_for(self, serve, labeler_of):
        server = serve(lambda body, seen: reply(body, "yes"))
        ((answer,),) = labeler_of(server, read="logprobs").answer(items("red?"))
        assert answer.failure == "no_logprobs"


class TestSamples:
    def test_share_of_yes(self, serve, labeler_of):
        says = iter(["Yes.", "no", "**yes**, it is", "Maybe", "yes"])
        server = serve(lambda body, seen: reply(body, next(says)))
        ((answer,),) = labeler_of(server, 1, read="samples").answer(items("red?"))
        close(answer, 0.6, 0.2, "samples")
        assert [body["seed"] for body in server.bodies] == [0, 1, 2, 3, 4]
        assert {body["temperature"] for body in server.bodies} == {1.0}

    def test_of_those_that_replied(self, serve, labeler_of):
        def script(body, seen):
            return error(500, "down") if body["seed"] < 2 else reply(body, "yes")

        server = serve(script)
        ((answer,),) = labeler_of(server, read="samples", samples=4).answer(items("red?"))
        close(answer, 1.0, 0.0, "samples")

    @pytest.mark.parametrize(("says", "why"), [("Maybe", NEITHER), (None, "server_error")])
    def test_no_answer_among_them(self, serve, labeler_of, says, why):
        server = serve(lambda body, seen: reply(body, says) if says else error(500, "down"))
        ((answer,),) = labeler_of(server, read="samples").answer(items("red?"))
        assert answer.failure == why and math.isnan(answer.p_yes)

    @pytest.mark.parametrize(
        ("says", "why"),
        [
            (("yes", "no", "Sorry", "I cannot", "Sorry"), NEITHER),
            (("yes", "yes", "Sorry", "Sorry", "Sorry"), NEITHER),
            (("yes", "no", "Maybe", "yes", "no"), TIE),
            (("yes", "no", "Sorry", "Sorry"), TIE),
            (("yes", "Sorry", "Sorry", "yes"), None),
        ],
    )
    def test_no_majority_is_no_answer(self, serve, labeler_of, says, why):
        server = serve(lambda body, seen: reply(body, says[body["seed"]]))
        ((answer,),) = labeler_of(server, read="samples", samples=len(says)).answer(items("red?"))
        assert answer.failure == why
        assert math.isnan(answer.p_yes) == (why is not None)

    def test_a_server_that_ignores_logprobs_is_sampled(self, serve, labeler_of):
        """It is found out by a few questions, not by all."""
        count = PROBED + 6
        server = serve(lambda body, seen: reply(body, "no"))
        (answers,) = labeler_of(server).answer(items(*(f"{n}?" for n in range(count))))
        assert len(answers) == count
        for answer in answers:
            close(answer, 0.0, 1.0, "samples")
        asked = [question(body) for body in server.bodies if "logprobs" in body]
        assert set(asked) == {f"{n}?" for n in range(PROBED)}

    def test_a_server_that_refuses_logprobs_is_sampled(self, serve, labeler_of):
        def script(body, seen):
            if "logprobs" in body:
                return error(400, "logprobs is not supported", param="logprobs")
            return reply(body, "yes")

        ((answer,),) = labeler_of(serve(script)).answer(items("red?"))
        close(answer, 1.0, 0.0, "samples")

    def test_samples_in_place_of_logprobs_are_told_once(self, serve, labeler_of, caplog):
        server = serve(lambda body, seen: reply(body, "no"))
        labeler = labeler_of(server, samples=3)
        for asked in (items("red?", "blue?"), items("green?")):
            labeler.answer(asked)
        (told,) = [
            record.getMessage() for record in caplog.records if record.levelname == "WARNING"
        ]
        assert told.startswith(f"{server.url}, model judge: no log-probs")
        for part in ("2 of 2 questions", "`samples: 3`", "`read: text`"):
            assert part in told

    def test_samples_that_were_asked_for_are_not_told(self, serve, labeler_of, caplog):
        labeler_of(serve(lambda body, seen: reply(body, "no")), read="samples").answer(
            items("red?")
        )
        assert not caplog.records

    def test_one_reply_without_logprobs_does_not_turn_the_others(self, serve, labeler_of):
        def script(body, seen):
            told = top(yes=0.9, no=0.1) if question(body) != "1?" else None
            return reply(body, "yes", told)

        ((first, second, third),) = labeler_of(serve(script)).answer(items("0?", "1?", "2?"))
        close(first, 0.9, 0.1)
        close(second, 1.0, 0.0, "samples")
        close(third, 0.9, 0.1)


class TestText:
    @pytest.mark.parametrize(
        ("says", "p_yes"), [("Yes, it is.", 1.0), (" no", 0.0), ('"No!"', 0.0), ("YES", 1.0)]
    )
    def test_first_word(self, serve, labeler_of, says, p_yes):
        server = serve(lambda body, seen: reply(body, says))
        ((answer,),) = labeler_of(server, read="text").answer(items("red?"))
        close(answer, p_yes, 1 - p_yes, "text")

    @pytest.mark.parametrize("says", ["It is red.", "no-one", "yesterday", "..."])
    def test_neither(self, serve, labeler_of, says):
        server = serve(lambda body, seen: reply(body, says))
        ((answer,),) = labeler_of(server, read="text", attempts=2).answer(items("red?"))
        assert answer.failure == NEITHER
        assert len(server.bodies) == 2

    def test_of_nothing(self):
        assert first_word(" \n") == ""


class TestOrder:
    def test_questions_about_an_image_go_out_one_after_another(self, serve, labeler_of):
        server = serve(lambda body, seen: reply(body, "y", top(yes=0.9, no=0.1)))
        asked = [
            (name, (image(number),), tuple(f"{name}{n}?" for n in range(3)))
            for number, name in enumerate("abc")
        ]
        labeler_of(server, max_concurrent=1).answer(asked)
        assert [question(body) for body in server.bodies] == [
            f"{name}{n}?" for name in "abc" for n in range(3)
        ]

    def test_answers_come_in_the_order_of_the_questions(self, serve, labeler_of):
        def script(body, seen):
            number = int(question(body))
            p = (number + 1) / 20
            return reply(body, "y", [("yes", math.log(p)), ("no", -5.0)], delay=0.02 * (number % 3))

        asked = [("a", (image(),), ("0", "1", "2", "3")), ("none", (), ()), ("b", (), ("4", "5"))]
        answers = labeler_of(serve(script)).answer(asked)
        assert [len(row) for row in answers] == [4, 0, 2]
        told = [answer.p_yes for row in answers for answer in row]
        assert told == pytest.approx([(number + 1) / 20 for number in range(6)])

    @pytest.mark.parametrize("how", ["auto", "samples", "logprobs", "text"])
    def test_no_questions(self, serve, labeler_of, how):
        server = serve(lambda body, seen: reply(body, "yes"))
        assert labeler_of(server, read=how).answer([("a", (image(),), ())]) == [[]]
        assert not server.bodies
