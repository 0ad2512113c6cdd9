"""Records packed into rows against the same records padded, each in a row of its own: all families.

That padded ones equal transformers is what the other tests here show.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
import transformers
from helpers import checks, families, pictures

from mmpo_jax.data.records import IMAGE, Record, Response, Turn
from mmpo_jax.inference.plan import plan_packed
from mmpo_jax.models.log_probs import response_log_probs, response_statistics

pytestmark = pytest.mark.parity

WORDS = ["a", "red", "star", "what", "is", "this", "?", "two", "blue", "ring", "and", "green"]
STATISTICS = ("collision", "logit")
TOLERANCE = 1e-9


def say(rng, most):
    return " ".join(rng.choice(WORDS, rng.integers(1, most)))


def later(rng):
    """A response that shows an image in a later turn of the user."""
    return Response(
        (
            Turn("assistant", say(rng, 5)),
            Turn("user", (say(rng, 5), IMAGE)),
            Turn("assistant", say(rng, 9)),
        )
    )


def records(sees):
    """Of all lengths, with one response and with three, with images here and there."""
    rng = np.random.default_rng(0)
    images = pictures.refs("odd-size", "grey", "photograph") if sees else ()
    made = []
    for number in range(9):
        count = number % 3 if sees else 0
        last = sees and number == 5  # whose last image is shown by its responses
        prompt = ((IMAGE,) * (count - last), say(rng, 12))
        responses = [
            later(rng) if last else Response.of(say(rng, 20)) for _ in range(1 + number % 3)
        ]
        shown = tuple(images[(number + place) % 3] for place in range(count)) if sees else ()
        turn = Turn("user", (*prompt[0], prompt[1]))
        made.append(Record(str(number), shown, (turn,), tuple(responses)))
    return made


PACKED = [name for name in families.FAMILIES if not name.startswith("qwen3_5")]
"""Families whose rows are packed: those without states."""


def case_of(name, family_case, tmp_path_factory):
    if name != "sliding":
        return family_case(name)
    folder = tmp_path_factory.mktemp("sliding") / "mistral"
    checks.save_tokenizer(folder)
    sizes = families.text_sizes((), False)
    config = transformers.MistralConfig(**sizes, sliding_window=7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return checks.make_case(folder, model)


@pytest.fixture
def programs_let_go():
    """Of a few families they have more memory mappings than Linux allows a process."""
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", [*PACKED, "sliding"])
@pytest.mark.usefixtures("programs_let_go")
@pytest.mark.slow
def test_log_probs_and_gradients(name, family_case, tmp_path_factory):
    """Whatever stands beside a record, in however many rows and groups, and in float64."""
    case = case_of(name, family_case, tmp_path_factory)
    sees = case.processor.images is not None
    tokenized, padded = checks.batch_of(case, [*records(sees), *families.filmed(name)])
    assert any(row.shows_later for row in tokenized) == sees
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), case.params)
        rng = np.random.default_rng(1)
        weights = rng.standard_normal(padded.loss_mask.shape) * padded.loss_mask

        def compute(params, batch, weights):
            found = response_statistics(case.model, params, batch, STATISTICS)
            return sum((x * weights).sum() for x in found.values()), found

        differentiate = jax.grad(compute, has_aux=True)
        expected_gradient, expected = differentiate(params, padded, weights)
        for batch_size, shards in ((2, 1), (9, 1), (9, 4)):
            (plan,) = plan_packed(tokenized, case.processor, shards, batch_size, len(tokenized))
            total, seen = None, []
            for planned in plan:
                batch = planned.make()
                own = np.zeros(batch.loss_mask.shape)
                r, t = (min(pair) for pair in zip(own.shape[1:], weights.shape[1:], strict=True))
                for number, place in planned.places:
                    own[place, :r, :t] = weights[number, :r, :t]
                gradient, found = differentiate(params, batch, own)
                total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
                for number, place in planned.places:
                    seen.append(number)
                    for response, row in enumerate(tokenized[number].responses):
                        mask = row.loss_mask
                        for key, values in found.items():
                            np.testing.assert_allclose(
                                values[place, response, : len(mask)][mask],
                                expected[key][number, response, : len(mask)][mask],
                                rtol=0,
                                atol=TOLERANCE,
                            )
            assert sorted(seen) == list(range(len(tokenized)))
            jax.tree.map(
                lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7),
                total,
                expected_gradient,
            )


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.slow
def test_responses_to_a_shared_prompt(name, family_case):
    """Their log-probs are those of every response behind a prompt of its own, in float64."""
    case = family_case(name)
    whole = [*families.records(name), *families.filmed(name)]
    alone = [
        dataclasses.replace(record, responses=(response,))
        for record in whole
        for response in record.responses
    ]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), case.params)
        compute = jax.jit(functools.partial(response_log_probs, case.model))
        together, apart = (
            np.asarray(compute(params, checks.batch_of(case, rows)[1])) for rows in (whole, alone)
        )
    assert together.std() > 0.5
    apart = apart.reshape(together.shape[0], together.shape[1], -1)
    np.testing.assert_allclose(together, apart, rtol=0, atol=TOLERANCE)


def with_other_words(row):
    """The record with all of its responses turned round."""
    turned = tuple(
        dataclasses.replace(response, ids=response.ids[::-1].copy()) for response in row.responses
    )
    return row if row.shows_later else dataclasses.replace(row, responses=turned)


def test_neighbours_are_not_seen(family_case):
    """Other words in another record of the same row change nothing."""
    case = family_case("llava")
    tokenized = checks.batch_of(case, records(True))[0]
    (plan,) = plan_packed(tokenized, case.processor, 1, 9, 9)
    changed = [row if row.id == "4" else with_other_words(row) for row in tokenized]
    (other,) = plan_packed(changed, case.processor, 1, 9, 9)
    compared = 0
    for before, after in zip(plan, other, strict=True):
        places = dict(before.places)
        if 4 not in places:
            continue
        assert len(places) > 1
        batches = before.make(), after.make()
        assert (batches[0].token_ids != batches[1].token_ids).any()
        values = [
            np.asarray(response_statistics(case.model, case.params, batch)["log_probs"])
            for batch in batches
        ]
        np.testing.assert_array_equal(values[0][places[4]], values[1][places[4]])
        compared += 1
    assert compared == 1
