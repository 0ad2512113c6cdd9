"""Training on packed rows: what it learns does not depend on packing, micro-batches or devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import meshes, tiny
from helpers.loop_runs import LENGTHS, make_record

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.data.pipeline import held_out_batches, training_batches
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.data.train_batch import USEFUL_SHARE
from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import batch_shards, put_batch
from mmpo_jax.scoring.log_probs import score_records
from mmpo_jax.training.losses import make_loss, needs_reference
from mmpo_jax.training.step import create_state, make_step

ROWS, BATCH_SIZE = 10, 8
CUTS = [(8, 1), (4, 1), (2, 1), (8, 4), (4, 2)]
"""(micro-batch size, devices)."""
TERMS = {
    "dpo": [make_term("dpo")],
    "per token": [make_term("dpo", ld_alpha=0.5)],
    "sorted": [make_term("aot")],
    "list": [make_term("dpo", weight=0.5), make_term("sft")],
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def examples(tiny_model, tiny_processor):
    """Pairs of several lengths, every third without an image, with a reference by token."""
    records = [
        dataclasses.replace(make_record(number), images=(), prompt=make_record(1).prompt)
        if number % 3 == 2
        else make_record(number)
        for number in range(ROWS)
    ]
    tokenized, skipped = tokenize_records(records, tiny_processor, LENGTHS)
    assert not skipped
    start = Checkpoint(tiny_model[0], tiny_processor, tiny_model[1])
    sums, tokens = (
        score_records(
            start, tokenized, LENGTHS, meshes.one_device(), 4, "float32", per_token=per_token
        )
        for per_token in (False, True)
    )
    longest = max(len(values) for row in tokens for values in row)
    made = []
    for row, of_row, of_tokens in zip(tokenized, sums, tokens, strict=True):
        padded = [np.pad(values, (0, longest - len(values))) for values in of_tokens]
        pair = tiny.example(row, of_row)
        both = {**pair.reference, "log_probs": np.float32([padded])}
        made.append(dataclasses.replace(pair, reference=both))
    return made


def reference_of(example, per_token):
    name = "log_probs" if per_token else "sums"
    return dataclasses.replace(example, reference={name: example.reference[name]})


def update(tiny_model, tiny_processor, examples, terms, micro, devices, packed):
    """(loss, gradient norm, parameters after an update in float64, kinds of the batches)."""
    mesh, model = meshes.mesh_of(devices, 1, 1), tiny_model[0]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tiny_model[1])
    batches = training_batches(
        examples,
        tiny_processor,
        LENGTHS,
        seed=0,
        epochs=1,
        batch_size=BATCH_SIZE,
        micro_batch_size=micro,
        packed_over=batch_shards(mesh) if packed else None,
    )
    host = next(batches)
    optimizer = optax.sgd(0.1)
    with jax.set_mesh(mesh):
        loss = make_loss(model, terms)
        state = create_state(params, model, optimizer, (), mesh, keeps=loss.state)
        step = make_step(loss, optimizer, lambda step: 0.1, state, jnp.float64)
        state, metrics = step(state, put_batch(host.arrays, mesh, leading=1))
    after = {path: np.asarray(leaf) for path, leaf in state.params.items()}
    return float(metrics["loss"]), float(metrics["grad_norm"]), after, host


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.slow
def test_an_update_is_that_of_padded_rows(tiny_model, tiny_processor, examples, name):
    terms = TERMS[name]
    per_token = name == "per token"
    rows = [reference_of(example, per_token) for example in examples]
    if not needs_reference(terms):
        rows = [dataclasses.replace(row, reference={}) for row in rows]
    arguments = tiny_model, tiny_processor, rows, terms
    loss, norm, params, host = update(*arguments, BATCH_SIZE, 1, packed=False)
    assert isinstance(host.arrays.prompts, Batch)
    for micro, devices in CUTS:
        ours, our_norm, after, host = update(*arguments, micro, devices, packed=True)
        assert isinstance(host.arrays.prompts, PackedBatch)
        assert 0 < host.metrics[USEFUL_SHARE] <= 1
        assert (ours, our_norm) == pytest.approx((loss, norm), rel=1e-5)
        for path, leaf in after.items():
            np.testing.assert_allclose(leaf, params[path], rtol=0, atol=1e-6, err_msg=path)


def test_held_out_rows_are_all_there_once(tiny_processor, examples):
    """In order within a batch or not, each with the fields that are its own."""
    rows = [
        dataclasses.replace(example, reference={"sums": np.float32([[number, -number]])})
        for number, example in enumerate(examples)
    ]
    seen = []
    for batch in held_out_batches(rows, tiny_processor, LENGTHS, 4, 1):
        for place in np.flatnonzero(batch.prompts.weights):
            counts = batch.prompts.loss_mask[place].sum(axis=-1).tolist()
            number, opposite = batch.reference["sums"][place].astype(int).tolist()
            assert number == -opposite
            assert counts == [int(r.loss_mask.sum()) for r in rows[number].contexts[0].responses]
            seen.append(number)
    assert sorted(seen) == list(range(ROWS))
