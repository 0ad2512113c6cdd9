"""Second images and per-side images in the step: as rows of their own, on any mesh, cut anyhow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import meshes

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.contexts import MAIN, OTHER_IMAGE, all_contexts
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import training_batches
from mmpo_jax.data.records import ImageRef, Record, Response, Span, Turn
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.models.head import next_token_logits, token_statistics
from mmpo_jax.models.log_probs import response_log_probs, shift_right
from mmpo_jax.objectives.terms import make_term, needs
from mmpo_jax.parallel.mesh import make_mesh, put_batch
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.scoring.log_probs import score_records
from mmpo_jax.training.examples import make_examples, tokenizer_for
from mmpo_jax.training.losses import gather, make_loss
from mmpo_jax.training.metrics import means
from mmpo_jax.training.step import create_state, make_step

LENGTHS = Lengths(prompt=(24,), response=(16,))
TEXTS = ("a red star and a green ring", "a blue star .", "two rings", "a red ring and two stars")
RATE = optax.constant_schedule(0.05)
MORE = (Turn("user", "is there a star ?"), Turn("assistant", "no"))


def image(number):
    return ImageRef(str(number), png_bytes(sample_scene("train", 0, number), 24))


def make_record(number, own=False, dialogue=False):
    chosen, rejected = (
        Response.of(TEXTS[(number + rank) % 4] + " ." * (number % 3), rank) for rank in (1, 2)
    )
    chosen = dataclasses.replace(chosen, spans=(Span(2, 6, weight=3.0, phrase=0),))
    rejected = dataclasses.replace(rejected, spans=(Span(0, 4, weight=2.0, phrase=0),))
    if dialogue and number % 2:
        chosen = dataclasses.replace(chosen, turns=chosen.turns + MORE, spans=())
    if own:
        rejected = dataclasses.replace(rejected, images=(image(number + 100),))
    prompt = (Turn("user", "what is in the picture ?"),)
    return Record(f"row-{number}", (image(number),), prompt, (chosen, rejected))


class Setup:
    """Terms, and eight records as one batch for them."""

    def __init__(self, model, params, processor, *terms, own=(), cached=True, dialogue=False):
        self.model, self.params, self.processor, self.terms = model, params, processor, terms
        records, skipped = tokenize_records(
            [make_record(number, number in own, dialogue) for number in range(8)],
            processor,
            LENGTHS,
            function=tokenizer_for(terms, seed=0),
        )
        assert not skipped
        self.records = records
        self.examples = make_examples(records, needs(terms), self.reference() if cached else None)
        self.names = self.examples[0].names
        self.loss = make_loss(model, terms, self.names)

    def reference(self):
        """Per token or summed, of a model that is not quite the policy."""
        rows = [row for record in self.records for _, row in all_contexts(record)]
        moved = jax.tree.map(lambda x: x * 1.02, self.params)
        per_token = "reference_tokens" in needs(self.terms)
        scores = score_records(
            Checkpoint(self.model, self.processor, moved),
            rows,
            LENGTHS,
            meshes.one_device(),
            16,
            "float32",
            per_token,
        )
        if not per_token:
            return {row.id: np.float32(x) for row, x in zip(rows, scores, strict=True)}
        longest = max(len(tokens) for x in scores for tokens in x)
        return {
            row.id: np.float32([np.pad(tokens, (0, longest - len(tokens))) for tokens in x])
            for row, x in zip(rows, scores, strict=True)
        }

    def batch(self, micro=8):
        batches = training_batches(
            self.examples,
            self.processor,
            LENGTHS,
            seed=0,
            epochs=1,
            batch_size=8,
            micro_batch_size=micro,
        )
        return next(batches)

    def step(self, mesh, micro=8):
        """(metrics, parameters) after an update."""
        optimizer = optax.sgd(RATE)
        dtype = jnp.float32 if "reference_model" in needs(self.terms) else None
        with jax.set_mesh(mesh):
            state = create_state(
                self.params, self.model, optimizer, (), mesh, reference_dtype=dtype
            )
            step = make_step(self.loss, optimizer, RATE, state)
            arrays = put_batch(self.batch(micro).arrays, mesh, leading=1)
            state, metrics = step(state, arrays)
        params = {path: np.asarray(leaf) for path, leaf in state.params.items()}
        return means([metrics]), params


@pytest.fixture(scope="module")
def setup(tiny_model, tiny_processor):
    return functools.partial(Setup, *tiny_model, tiny_processor)


@pytest.mark.parametrize("own", [(), (1, 4)], ids=["one image", "per-side images"])
@pytest.mark.slow
def test_every_context_is_a_row_of_its_own(setup, own):
    """Log-probs of both contexts, and their gradient, are those of separate rows."""
    with jax.enable_x64(True):
        made = setup(make_term("mdpo", image="black"), own=own, cached=False)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), made.params)
        host = made.batch()
        batch = jax.tree.map(lambda x: x[0], host.arrays)
        assert made.names == (MAIN,) * (1 + bool(own)) + (OTHER_IMAGE,) * (1 + bool(own))
        rng = np.random.default_rng(0)
        size = (8, *batch.prompts.response_ids.shape[1:])
        cotangent = {name: rng.standard_normal(size) for name in (MAIN, OTHER_IMAGE)}

        def together(params):
            responses = gather(made.loss.forward(params, None, batch), batch, made.names)
            other = responses.views[OTHER_IMAGE]
            values = {MAIN: responses.log_probs, OTHER_IMAGE: other.log_probs}
            total = sum((values[name] * cotangent[name]).sum() for name in values)
            return total, (values, responses.mask, other.mask)

        slopes, (values, *masks) = jax.jit(jax.grad(together, has_aux=True))(params)
        np.testing.assert_array_equal(*masks)

        by_id = {record.id: record for record in made.records}
        rows, places = [], []
        for row, id_ in enumerate(host.ids):
            for name, context in all_contexts(by_id[id_]):
                for place, response in enumerate(context.responses):
                    if len(response.ids):
                        rows.append(dataclasses.replace(context, responses=(response,)))
                        places.append((name, row, place))
        alone = pad_batch(
            rows, made.processor, rows=len(rows), prompt_sizes=(24,), response_sizes=(16,)
        )
        assert len(rows) == 32

        def separate(params):
            log_probs = response_log_probs(made.model, params, alone)[:, 0]
            total = sum(
                (log_probs[i] * cotangent[name][row, place]).sum()
                for i, (name, row, place) in enumerate(places)
            )
            return total, log_probs

        expected_slopes, expected = jax.jit(jax.grad(separate, has_aux=True))(params)
    for i, (name, row, place) in enumerate(places):
        np.testing.assert_allclose(values[name][row, place], expected[i], rtol=0, atol=1e-9)
    assert np.abs(values[MAIN] - values[OTHER_IMAGE]).max() > 0.1
    for path, leaf in flatten(expected_slopes).items():
        np.testing.assert_allclose(flatten(slopes)[path], leaf, rtol=0, atol=1e-7, err_msg=path)


@pytest.mark.slow
def test_what_is_most_probable_after_the_other_image(setup):
    """From whole logits, which are not stored otherwise; in any chunks, and under a reference."""
    made = setup(make_term("povid"), cached=False)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), made.params)
        moved = jax.tree.map(lambda x: x * 1.05, params)
        batch = jax.tree.map(lambda x: x[0], made.batch().arrays)
        outputs = jax.jit(made.loss.forward)(params, moved, batch)
        mask = batch.prompts.response_mask
        for prefix, of in (("", params), ("reference_", moved)):
            module = made.model.bind(of)
            hidden = shift_right(*module.hidden_states(batch.prompts))
            log_probs = np.asarray(jax.nn.log_softmax(next_token_logits(module, hidden)))
            clean, noisy = log_probs[::2], log_probs[1::2]
            best = noisy.argmax(axis=-1)
            expected = np.take_along_axis(clean, best[..., None], axis=-1)[..., 0]
            np.testing.assert_allclose(
                outputs[prefix + "own"][::2], expected * mask[::2], rtol=0, atol=1e-9
            )
            assert (clean.argmax(axis=-1) != best)[mask[::2]].mean() > 0.02
            logit = np.take_along_axis(
                np.asarray(next_token_logits(module, hidden)),
                batch.prompts.response_ids[..., None],
                axis=-1,
            )[..., 0]
            head = (hidden, module.language_model.head_kernel())
            ids = batch.prompts.response_ids
            found = token_statistics(*head, ids, ("own", "logit"), head, chunk=3, partners=(1, 1))
            for name in ("own", "reference_own"):
                np.testing.assert_allclose(found[name][::2], expected, rtol=0, atol=1e-9)
            for name in ("logit", "reference_logit"):
                np.testing.assert_allclose(found[name], logit, rtol=0, atol=1e-9)


TERMS = {
    "mdpo and tokens": [("mdpo", {"image": "noise"}), ("ddpo", {})],
    "povid and visual anchors": [("povid", {}), ("tpo_visual", {})],
    "dialogues": [("nsft", {"kl_weight": 0.1}), ("tdpo2", {})],
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.slow
def test_any_mesh_and_any_micro_batches(setup, name):
    terms = [make_term(kind, **options) for kind, options in TERMS[name]]
    cached, dialogue = "reference_model" not in needs(terms), name == "dialogues"
    made = setup(*terms, own=() if dialogue else (1, 4), cached=cached, dialogue=dialogue)
    first, params = made.step(meshes.one_device())
    assert first["finite"] == 1
    assert first["grad_norm"] > 0.1
    for mesh, micro in ((make_mesh(2, 2, 2), 8), (meshes.one_device(), 2)):
        ours, others = made.step(mesh, micro)
        assert ours.keys() == first.keys()
        for key in first:
            if key != "rewards/accuracies":  # margins may be 0 up to rounding
                assert ours[key] == pytest.approx(first[key], rel=2e-5, abs=2e-5), key
        for path, leaf in params.items():
            np.testing.assert_allclose(others[path], leaf, rtol=0, atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_a_reference_that_runs_is_the_one_that_was_stored(setup):
    """At step 0 the start model is the policy, whichever way the reference is computed."""
    term = make_term("mdpo")
    made = setup(term, cached=False)
    rows = [row for record in made.records for _, row in all_contexts(record)]
    scores = score_records(
        Checkpoint(made.model, made.processor, made.params), rows, LENGTHS, meshes.one_device(), 16
    )
    stored = {row.id: np.float32(x) for row, x in zip(rows, scores, strict=True)}
    made.examples = make_examples(made.records, needs([term]), stored)
    batch = jax.tree.map(lambda x: x[0], made.batch().arrays)
    forward = jax.jit(made.loss.forward)
    cached = gather(forward(made.params, None, batch), batch, made.names)
    running = dataclasses.replace(batch, reference={})
    running = gather(forward(made.params, made.params, batch), running, made.names)
    views = (cached.views[OTHER_IMAGE], running.views[OTHER_IMAGE])
    for ours, theirs in ((cached, running), views):
        np.testing.assert_allclose(ours.ratio, 0, atol=1e-5)
        np.testing.assert_allclose(theirs.ratio, 0, atol=1e-5)
        np.testing.assert_allclose(ours.reference, theirs.reference, rtol=1e-6)


def test_fields_of_tokens(setup):
    made = setup(*(make_term(kind) for kind in ("ddpo", "weighted_dpo", "rrpo")), cached=False)
    for example in made.examples:
        for place, (start, weight) in enumerate(((2, 3.0), (0, 2.0))):
            response = example.contexts[0].responses[place]
            words = response.source.text[start : start + 4].split()
            marked = example.fields["token_weights"][place] == weight
            assert made.processor.decode(response.ids[marked[: len(response.ids)]].tolist())
            assert len(words) <= marked.sum() <= 2
            np.testing.assert_array_equal(example.fields["phrases"][place], marked)
            np.testing.assert_array_equal(example.fields["changed"][place], marked)
