"""Conquer: the answers to k questions about an image equal k separate plain forward passes."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import meshes
from helpers.plain_answers import plain_answer

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.trees import map_with_path
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.processor_files import ProcessorError
from mmpo_jax.data.records import ImageRef
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.feedback import labeler as labeler_module
from mmpo_jax.feedback.labeler import CheckpointLabeler, answer_probabilities, answer_tokens
from mmpo_jax.inference.plan import packed_over
from mmpo_jax.picture_world.processor import CHAT_TEMPLATE, TOKENS
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene

LENGTHS = Lengths(prompt=(24,), response=(16,))
QUESTIONS = (
    "is there a red star in the picture ?",
    "is there a red star",  # the beginning of the one before
    "is there a red star in the picture ?",  # asked twice
    "are there exactly two blue rings in the picture ?",
    "red ?",
)


@pytest.fixture
def make_labeler(tiny_folder, tiny_model, tiny_processor, mesh):
    def make(processor=tiny_processor, lengths=LENGTHS, **options):
        model, params = tiny_model
        options = {"batch_size": 3, "questions_at_once": 16} | options
        return CheckpointLabeler(Checkpoint(model, processor, params), mesh, lengths, **options)

    return make


@pytest.fixture
def make_processor(tiny_folder, tmp_path):
    """A processor with other words or another chat template."""

    def make(template=CHAT_TEMPLATE, edit=None):
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        if edit:
            edit(tokenizer)
        path.write_text(json.dumps(tokenizer))
        return Processor(folder, load_config(folder))

    return make


@pytest.fixture
def leading(make_processor):
    """A processor whose template begins every answer with a comma."""
    template = CHAT_TEMPLATE.replace(
        "{{- ' ' + part['text'] -}}",
        "{{- (' , ' if message['role'] == 'assistant' else ' ') + part['text'] -}}",
    )
    assert template != CHAT_TEMPLATE
    return make_processor(template)


def image(number: int = 0) -> ImageRef:
    return ImageRef(f"image-{number}", png_bytes(sample_scene("test", 0, number), 24))


def probabilities(labeler, items):
    """(p_yes, p_no) of every question of every item."""
    answers = labeler.answer(items)
    assert {(a.read, a.failure) for row in answers for a in row} <= {("probabilities", None)}
    return [[answer[:2] for answer in row] for row in answers]


def check(labeler, items, tiny_model):
    """Every answer is the plain forward pass's."""
    model, params = tiny_model
    answers = probabilities(labeler, items)
    assert [len(pairs) for pairs in answers] == [len(questions) for _, _, questions in items]
    seen = []
    for (_, (picture,), questions), pairs in zip(items, answers, strict=True):
        for question, pair in zip(questions, pairs, strict=True):
            expected = plain_answer(
                model, params, labeler.checkpoint.processor, picture, question, labeler.lead
            )
            np.testing.assert_allclose(pair, expected, rtol=2e-4, atol=1e-7)
            seen.append(pair)
    # The model has to tell the questions apart, or equality would say little.
    return len({round(p_yes, 5) for p_yes, _ in seen})


def test_many_questions_about_one_image(make_labeler, tiny_model):
    assert check(make_labeler(), [("a", (image(),), QUESTIONS)], tiny_model) == 4


def test_more_questions_than_at_once_and_more_rows_than_a_batch(make_labeler, tiny_model):
    items = [
        ("a", (image(0),), QUESTIONS),
        ("b", (image(1),), QUESTIONS[1:3]),
        ("none", (image(2),), ()),
        ("c", (image(3),), QUESTIONS[:1]),
    ]
    labeler = make_labeler(batch_size=2, questions_at_once=2)
    assert check(labeler, items, tiny_model) == 7


def test_one_question_alone_is_wholly_the_shared_prompt(make_labeler, tiny_model):
    assert check(make_labeler(), [("a", (image(),), QUESTIONS[3:4])], tiny_model) == 1


def test_the_same_question_twice(make_labeler, tiny_model):
    check(make_labeler(), [("a", (image(),), QUESTIONS[:1] * 2)], tiny_model)


def test_one_question_alone_may_be_longer_than_the_prompt_bucket(make_labeler, tiny_model):
    """A lone question shares all of itself with itself; it still counts as a response."""
    short = Lengths(prompt=(8,), response=(16,))  # <s> USER: <image>x4 and two words
    assert check(make_labeler(lengths=short), [("a", (image(),), QUESTIONS[3:4])], tiny_model) == 1
    items = [("a", (image(),), QUESTIONS), ("b", (image(1),), QUESTIONS[:1])]
    assert check(make_labeler(lengths=short, questions_at_once=2), items, tiny_model) == 5


def test_all_on_eight_devices(make_labeler, tiny_model, tiny_processor):
    model, params = tiny_model
    mesh = meshes.mesh_of(2, 4, 1)
    labeler = CheckpointLabeler(
        Checkpoint(model, tiny_processor, params), mesh, LENGTHS, batch_size=3
    )
    items = [("a", (image(0),), QUESTIONS), ("b", (image(1),), QUESTIONS[:2])]
    for ours, theirs in zip(
        probabilities(labeler, items), probabilities(make_labeler(), items), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-7)


def many(count: int) -> tuple[str, ...]:
    """So many different questions."""
    colours, shapes = ("red", "blue", "green", "yellow"), ("star", "ring", "square")
    numbers = ("one", "two", "three")
    kinds = itertools.product(("is there a", "are there exactly two"), colours, shapes, numbers)
    asked = [f"{start} {colour} {shape} {number} ?" for start, colour, shape, number in kinds]
    asked += [f"{question[:-2]} in the picture ?" for question in asked]
    asked += [f"{question[:-2]} or {colour} ?" for question in asked for colour in colours[:2]]
    assert len(set(asked)) == len(asked) >= count
    return tuple(asked[:count])


MANY = (1, 15, 80, 200)


@pytest.mark.parametrize("devices", [1, 8])
def test_any_number_of_questions_padded_and_packed(tiny_model, tiny_processor, devices):
    """Kernels get padded batches; where there is none, as here, plain JAX computes them too."""
    model, params = tiny_model
    mesh = meshes.one_device() if devices == 1 else meshes.mesh_of(2, 4, 1)
    items = [(str(count), (image(count),), many(count)) for count in MANY]

    def answered(model, **options):
        checkpoint = Checkpoint(model, tiny_processor, params)
        return probabilities(
            CheckpointLabeler(checkpoint, mesh, LENGTHS, batch_size=8, **options), items
        )

    packed = answered(model)
    kernel = dataclasses.replace(model, attention="cudnn")
    assert packed_over(model, mesh) == devices and packed_over(kernel, mesh) is None
    padded = answered(kernel)
    alone = answered(model, questions_at_once=16)
    for ours, others, few in zip(packed, padded, alone, strict=True):
        np.testing.assert_allclose(ours, others, rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(ours, few, rtol=2e-4, atol=1e-7)
    assert len({round(yes, 6) for yes, _ in packed[-1]}) > 100


@pytest.mark.parametrize("backend", ["xla", "cudnn"])
def test_few_programs_for_all_numbers_of_questions(tiny_model, tiny_processor, mesh, backend):
    model, params = tiny_model
    checkpoint = Checkpoint(dataclasses.replace(model, attention=backend), tiny_processor, params)
    labeler = CheckpointLabeler(checkpoint, mesh, LENGTHS, batch_size=2)
    items = [(str(count), (image(count),), many(count)) for count in range(1, 41)]
    before = answer_probabilities._cache_size()
    labeler.answer(items)
    assert answer_probabilities._cache_size() - before <= 4


@pytest.mark.parametrize(
    ("question", "lengths"),
    [
        ("red " * 60 + "?", LENGTHS),
        ("is there a red star ?", Lengths(prompt=(4,), response=(16,))),  # not even the image
    ],
)
def test_what_does_not_fit_is_an_error_for_people(make_labeler, question, lengths):
    with pytest.raises(DataError, match=r"scene-9.*lengths\.(prompt|response)"):
        make_labeler(lengths=lengths).answer([("scene-9", (image(),), (question, "red ?"))])


@pytest.mark.slow
def test_parameters_of_mixed_dtype(make_labeler, tiny_model):
    params = map_with_path(
        lambda path, leaf: leaf if path.endswith("/scale") else leaf.astype(jnp.bfloat16),
        tiny_model[1],
    )
    uniform = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    labeler = make_labeler()
    asked = [("a", (image(),), ("is there a star ?",))]
    answers = []
    for weights in (params, uniform):
        labeler.checkpoint = dataclasses.replace(labeler.checkpoint, params=weights)
        answers.append(labeler.answer(asked))
    assert answers[0] == answers[1]


def test_probabilities_that_are_not_finite_are_no_answers(make_labeler, tiny_model):
    labeler = make_labeler()
    huge = map_with_path(
        lambda path, leaf: leaf * np.float32(1e38 if "lm_head" in path else 100), tiny_model[1]
    )
    labeler.checkpoint = dataclasses.replace(labeler.checkpoint, params=huge)
    items = [(name, (image(),), QUESTIONS[:1]) for name in ("scene-1", "scene-2")]
    with pytest.raises(DataError, match="probabilities of rows scene-1, scene-2 are not finite in"):
        labeler.answer(items)


def test_no_item_runs_nothing(make_labeler, monkeypatch):
    monkeypatch.setattr(labeler_module, "answer_probabilities", None)
    assert make_labeler().answer([]) == []
    assert make_labeler().answer([("a", (image(),), ())]) == [[]]


class TestAnswerTokens:
    def test_words_outside_the_vocabulary_are_left_out(self, tiny_processor):
        """The picture world has no Yes and no No."""
        assert answer_tokens(tiny_processor) == (
            (),
            (TOKENS.index("yes"),),
            (TOKENS.index("no"),),
        )

    def test_every_spelling_counts(self, make_processor, make_labeler, tiny_model):
        def capital(tokenizer):
            """Two words of no use here become Yes and No."""
            words = tokenizer["model"]["vocab"]
            words["Yes"], words["No"] = words.pop("column"), words.pop("row")

        processor = make_processor(edit=capital)
        _, yes, no = answer_tokens(processor)
        assert yes == tuple(sorted([TOKENS.index("yes"), TOKENS.index("column")]))
        assert no == tuple(sorted([TOKENS.index("no"), TOKENS.index("row")]))
        items = [("a", (image(),), QUESTIONS[:2])]
        both = np.array(probabilities(make_labeler(processor), items))
        small = np.array(probabilities(make_labeler(), items))
        assert (both > small + 1e-6).all()

    def test_a_token_that_begins_every_answer(self, leading, make_labeler, tiny_model):
        lead, yes, no = answer_tokens(leading)
        assert lead == (TOKENS.index(","),)
        assert (yes, no) == ((TOKENS.index("yes"),), (TOKENS.index("no"),))
        items = [("a", (image(),), QUESTIONS), ("b", (image(1),), QUESTIONS[:1])]
        assert check(make_labeler(leading), items, tiny_model) == 5

    @pytest.mark.parametrize("missing", [("no",), ("yes",), ("yes", "no")])
    def test_a_tokenizer_without_the_words(self, make_processor, missing):
        def forget(tokenizer):
            for word in missing:
                tokenizer["model"]["vocab"].pop(word)

        with pytest.raises(ProcessorError, match="cannot tell yes from no"):
            answer_tokens(make_processor(edit=forget))

    def test_words_that_begin_and_end_alike(self, make_processor):
        template = CHAT_TEMPLATE.replace(
            "{{- ' ' + part['text'] -}}",
            "{{- ' ' + ('red' if message['role'] == 'assistant' else part['text']) -}}",
        )
        with pytest.raises(ProcessorError, match="cannot tell yes from no"):
            answer_tokens(make_processor(template))

    def test_the_labeler_says_so(self, make_processor, make_labeler):
        processor = make_processor(edit=lambda tokenizer: tokenizer["model"]["vocab"].pop("no"))
        with pytest.raises(ProcessorError, match="cannot tell yes from no"):
            make_labeler(processor)


def test_a_question_that_no_tokenizer_takes_is_rejected(make_labeler, tiny_model):
    """It costs that claim and not the run; the answers to the others are those without it."""
    strange = "is there a \U0010f000 ?"
    labeler = make_labeler(questions_at_once=2)
    (without,) = labeler.answer([("scene", (image(),), QUESTIONS[:3])])
    asked = (QUESTIONS[0], strange, *QUESTIONS[1:3])
    (answers,) = labeler.answer([("scene", (image(),), asked)])
    assert answers[1][:2] == (0.0, 1.0)
    assert [answers[0], *answers[2:]] == without


def test_without_bucket_sizes_a_question_that_is_too_long_fails_alone(make_labeler, monkeypatch):
    """The others' answers are those without it; a recipe's sizes are those of another model."""

    def limited(record, *limits):
        if any(len(response.turns[0].text) > 1000 for response in record.responses):
            raise UnusableRow("prompt_too_long", "the model's positions end")
        return tokenize(record, *limits)

    monkeypatch.setattr(labeler_module, "tokenize", limited)
    labeler = make_labeler(lengths=None)
    (without,) = labeler.answer([("scene", (image(),), QUESTIONS[:3])])
    long = " ".join(["red"] * 300)
    items = [
        ("scene", (image(),), (QUESTIONS[0], long, *QUESTIONS[1:3])),
        ("b", (image(),), (long,)),
    ]
    first, (alone,) = labeler.answer(items)
    assert [answer.failure for answer in first] == [None, "prompt_too_long", None, None]
    assert alone.failure == "prompt_too_long" and np.isnan(alone.p_yes)
    np.testing.assert_allclose(
        [answer[:2] for answer in (first[0], *first[2:])],
        [answer[:2] for answer in without],
        rtol=2e-4,
    )
    (given,) = make_labeler().answer([("scene", (image(),), QUESTIONS[:3])])
    np.testing.assert_allclose([a[:2] for a in given], [a[:2] for a in without], rtol=2e-4)
