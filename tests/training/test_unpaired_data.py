"""Single responses on their way to the loss: verdicts, mismatched responses, global statistics."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from helpers import meshes

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import training_batches
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse, tokenize_records
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import put_batch, put_params
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.training import CachedReference, GivenReference, Training
from mmpo_jax.training.examples import make_examples, unfit, with_mismatched
from mmpo_jax.training.fields import lacks
from mmpo_jax.training.losses import gather, make_loss
from mmpo_jax.training.step import create_state, make_step

LENGTHS = Lengths(prompt=(16,), response=(8,))
TEXTS = ("a red star", "two rings", "yes", "no", "a ring and a star", "one", "a blue cross", "no")


def make_record(number, responses):
    return Record(
        id=f"row-{number}",
        images=(ImageRef(f"{number}", png_bytes(sample_scene("train", 0, number), 24)),),
        prompt=(Turn("user", "a ring ?"),),
        responses=responses,
    )


@pytest.fixture(scope="module")
def tokenized(tiny_processor):
    def tokenized(responses):
        records = [make_record(number, given) for number, given in enumerate(responses)]
        kept, skipped = tokenize_records(records, tiny_processor, LENGTHS)
        assert not skipped
        return kept

    return tokenized


def labelled(text, desirable=None, rank=None, scores=()):
    scores = {str(i): score for i, score in enumerate(scores)}
    return dataclasses.replace(Response.of(text, rank), desirable=desirable, scores=scores)


@pytest.fixture(scope="module")
def records(tokenized):
    """One response to each of 7 prompts, every third of them undesirable."""
    return tokenized([(labelled(text, i % 3 > 0),) for i, text in enumerate(TEXTS[:7])])


def test_verdicts(tokenized):
    given = [
        (labelled("a star", True), labelled("two rings", False)),
        (labelled("a star", rank=2), labelled("two rings", rank=1), labelled("no", rank=2)),
        (labelled("a star", rank=1), labelled("two rings", rank=1)),
        (labelled("a star"), labelled("two rings", True)),
    ]
    records = tokenized(given)
    verdicts = [make_examples([r], {"desirable"})[0].fields["desirable"] for r in records[:2]]
    assert [list(values) for values in verdicts] == [[1, 0], [0, 1, 0]]
    assert [lacks(record, "desirable") for record in records[:2]] == [None, None]
    reasons = [unfit(r, [make_term("kto")], CachedReference()) for r in records[2:]]
    assert [reason for reason, _ in reasons] == ["no_label", "no_label"]
    with pytest.raises(DataError, match="no row has the field 'desirable'"):
        make_examples(records[2:], {"desirable"})


def test_log_probs_of_other_models(tokenized):
    """Scores of that name only, and no number over 0 passes for one."""

    def scored(text, **scores):
        named = {name.replace("_of_", "/"): value for name, value in scores.items()}
        return dataclasses.replace(Response.of(text), scores=named)

    good, judged, bad = tokenized(
        [
            (
                scored("a star", log_prob_of_a=-1.0, log_prob_of_b=-2.0, helpfulness=4.0),
                scored("no", log_prob_of_a=-3.0),
            ),
            (scored("a star", helpfulness=-4.0),),
            (scored("a star", log_prob_of_a=0.5),),
        ]
    )
    fields = make_examples([good], {"other_models"})[0].fields
    np.testing.assert_array_equal(fields["other_models"], [-1.5, -3])
    assert lacks(good, "other_models") is None
    assert lacks(judged, "other_models")[0] == "no_score"
    assert lacks(bad, "other_models") == (
        "bad_log_prob",
        "log_prob/a is 0.5; a log-prob is at most 0",
    )


def test_each_record_has_the_responses_of_the_one_before(records, tiny_processor):
    mixed = with_mismatched(records)
    for i, record in enumerate(mixed):
        own, other = record.responses
        assert not own.mismatched
        assert other.mismatched
        np.testing.assert_array_equal(own.ids, records[i].responses[0].ids)
        np.testing.assert_array_equal(other.ids, records[i - 1].responses[0].ids)
    with pytest.raises(DataError, match="only one record"):
        with_mismatched(records[:1])


def questions(letters):
    """A record with one response, its number, to the prompt and image of every letter: of small and
    capital ones the image is another, of equal ones only its name."""
    learned = np.ones(1, bool)
    return [
        TokenizedRecord(
            id=str(number),
            prompt_ids=np.array([ord(letter.lower())], np.int32),
            responses=(
                TokenizedResponse(np.array([number], np.int32), learned, 0, Response.of("")),
            ),
            images=(ImageRef(f"image {number}", b"big" if letter.isupper() else b"small"),),
            layouts=(),
        )
        for number, letter in enumerate(letters)
    ]


@pytest.mark.parametrize(
    ("letters", "wanted"),
    [
        ("abcd", [3, 0, 1, 2]),
        ("aAbB", [3, 0, 1, 2]),
        ("aabbcc", [4, 5, 0, 1, 2, 3]),
        ("aabba", [2, 3, 0, 1, 3]),
        ("abbbc", [4, 0, 0, 0, 3]),
        ("aaabc", [4, 4, 4, 2, 3]),
        ("aab", [2, 2, 1]),
        ("aaa", [2, 0, 1]),
        ("aA" * 3, [5, 0, 1, 2, 3, 4]),
    ],
)
def test_mismatched_responses_are_to_another_prompt_or_image(letters, wanted):
    """The nearest before that is another; pairs, exported one by one, keep their two kinds."""
    mixed = with_mismatched(questions(letters))
    assert [int(record.responses[1].ids[0]) for record in mixed] == wanted
    for record in mixed if len(set(letters)) > 1 else ():
        assert letters[int(record.responses[1].ids[0])] != letters[int(record.id)]


def test_long_runs_of_one_prompt_are_no_search():
    mixed = with_mismatched(questions("a" * 30_000 + "b"))
    assert {int(record.responses[1].ids[0]) for record in mixed} == {29_999, 30_000}


def test_what_is_said_of_a_record_does_not_depend_on_the_one_before(tokenized):
    """Ranks, labels and scores of other records' responses say nothing of its own."""
    (label,) = tokenized([(labelled("no", True),)])
    first, second = tokenized(
        [
            (labelled("a star", rank=1, scores=(2.0,)), labelled("a ring", rank=2, scores=(0.0,))),
            (labelled("one", rank=2, scores=(4.0,)), labelled("yes", rank=3, scores=(9.0,))),
        ]
    )
    pairwise = {"rank", "desirable", "win_rate", "changed"}
    for records, asked in (([label, first], {"desirable"}), ([second, first], pairwise)):
        alone = make_examples([first], asked)[0].fields
        mixed = make_examples(with_mismatched(records), asked | {"mismatched"})[1].fields
        others = len(records[0].responses)
        np.testing.assert_array_equal(mixed["mismatched"], [0, 0] + [1] * others)
        for field in asked:
            np.testing.assert_array_equal(mixed[field][:2], alone[field])
            np.testing.assert_array_equal(mixed[field][2:], 0)
    assert list(alone["desirable"]) == [1, 0]


def test_mismatched_responses_are_a_view(records, tiny_processor):
    """And missing for objectives that do not ask for them. The last row only fills the batch."""
    examples = make_examples(with_mismatched(records), make_term("kto").needs, references(records))
    batch = next(batches(examples, tiny_processor, 8, epochs=1)).arrays
    batch = jax.tree.map(lambda x: x[0], batch)
    responses = gather({"log_probs": np.float32(batch.prompts.loss_mask)}, batch)
    real = batch.prompts.weights
    assert real.sum() == 7
    np.testing.assert_array_equal(responses.present, np.outer(real, [1, 0]))
    np.testing.assert_array_equal(responses.views["mismatched"].present, np.outer(real, [0, 1]))
    number = -batch.reference["sums"][:7, 0]
    np.testing.assert_array_equal(responses.fields["desirable"][:7, 0] > 0, number % 3 > 0)


def references(records):
    """id -> the row's number and, for its mismatched response, a hundred more; negative."""
    return {record.id: -np.float32([i, 100 + i]) for i, record in enumerate(records)}


def batches(examples, processor, micro, epochs=2):
    return training_batches(
        examples,
        processor,
        LENGTHS,
        seed=0,
        epochs=epochs,
        batch_size=8,
        micro_batch_size=micro,
    )


@pytest.mark.parametrize("name", ["kto", "bco"])
@pytest.mark.slow
def test_devices_and_micro_batches_change_nothing(name, tiny_model, tiny_processor, records):
    """Fourteen rows in two steps of eight: the shift of the first moves the second."""
    model, params = tiny_model
    rng = np.random.default_rng(0)
    term = make_term(name, beta=0.5)
    given = with_mismatched(records) if "mismatched" in term.needs else records
    sums = {r.id: np.float32(rng.normal(-12, 3, len(r.responses))) for r in given}
    examples = make_examples(given, term.needs, sums)
    loss = make_loss(model, [term])

    def run(devices, micro):
        mesh = meshes.mesh_of(1, devices, 1)
        optimizer, schedule = optax.sgd(1e-2), optax.constant_schedule(1e-2)
        with jax.set_mesh(mesh):
            placed = put_params(params, model.rules, mesh)
            state = create_state(placed, model, optimizer, (), mesh, keeps=loss.state)
            step = make_step(loss, optimizer, schedule, state)
            found = []
            for host in batches(examples, tiny_processor, micro):
                state, metrics = step(state, put_batch(host.arrays, mesh, leading=1))
                found.append(jax.device_get(metrics))
            return found, jax.device_get((state.objective_state, state.params))

    metrics, ended = run(1, 8)
    assert len(metrics) == 2
    assert metrics[0]["loss"] != metrics[1]["loss"]
    for devices, micro in ((8, 8), (1, 2)):
        other, also = run(devices, micro)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), metrics, other)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ended, also)


def test_given_log_probs_are_of_other_prompts():
    with pytest.raises(ValueError, match="kto needs the responses of a record before"):
        Training(objective={"type": "kto"}, reference={"type": "given"})


def test_a_given_log_prob_is_of_the_whole_response(tokenized):
    """What was cut off counts in the data's log-prob and not in the policy's."""
    (whole,) = tokenized([(dataclasses.replace(labelled("a star", True), log_prob=-3.0),)])
    shorter = dataclasses.replace(whole.responses[0], truncated=2)
    cut = dataclasses.replace(whole, responses=(shorter,))
    terms = [make_term("kto")]
    assert unfit(whole, terms, GivenReference()) is None
    assert unfit(cut, terms, CachedReference()) is None
    reason, detail = unfit(cut, terms, GivenReference())
    assert reason == "no_reference"
    assert "lost its tail" in detail
