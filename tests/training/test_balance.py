"""The load-balancing loss of a mixture: transformers', and one of the whole batch however it is
cut."""

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
import torch
from helpers import checks, tiny
from helpers.meshes import one_device

from mmpo_jax.core.trees import flatten
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.models.log_probs import LOADS, response_statistics
from mmpo_jax.models.routing import load_balancing_loss
from mmpo_jax.models.vocabulary import without_added
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import make_mesh, put_batch
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.losses import AUX_LOSS, make_loss
from mmpo_jax.training.metrics import means
from mmpo_jax.training.plan import TrainingError, check_training
from mmpo_jax.training.step import create_state, make_step

TEXTS = ["a red star", "two blue ring and a green star", "is this a star ?", "a ring"]


@pytest.fixture(scope="module")
def case(family_case):
    return family_case("qwen3_moe")


@pytest.fixture(scope="module")
def records():
    return [checks.record(str(n), "what is " * (n + 1), (), text) for n, text in enumerate(TEXTS)]


@pytest.mark.parity
def test_it_is_that_of_transformers(case, records):
    tokenized, batch = checks.batch_of(case, records)
    found = jax.jit(
        lambda params, batch: response_statistics(case.model, params, batch, loads=True)[LOADS]
    )(case.params, batch)
    rows = [np.concatenate([row.prompt_ids, row.responses[0].ids]) for row in tokenized]
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    with torch.no_grad():
        theirs = case.theirs(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            output_router_logits=True,
        ).aux_loss
    top_k = case.model.config.decoder.experts[0].top_k
    ours = float(load_balancing_loss(found, top_k))
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    assert abs(ours - top_k) > 1e-2  # what it is where all experts have as much


def gradients(case, batch, mesh, micro_batches, balance):
    """(metrics, path -> what plain gradient descent changes) of one step."""
    loss = make_loss(case.model, [make_term("sft")], balance=balance)
    optimizer = optax.sgd(1.0)
    with jax.set_mesh(mesh):
        state = create_state(case.params, case.model, optimizer, (), mesh)
        step = make_step(loss, optimizer, optax.constant_schedule(1.0), state)
        cut = jax.tree.map(
            lambda x: x.reshape(micro_batches, len(x) // micro_batches, *x.shape[1:]), batch
        )
        state, metrics = step(state, put_batch(cut, mesh, leading=1))
    start = flatten(case.params)
    tokens = case.model.config.decoder.vocab_size
    changes = {
        path: without_added(path, np.asarray(leaf), tokens) - start[path]
        for path, leaf in state.params.items()
    }
    return {name: float(value) for name, value in means([metrics]).items()}, changes


def test_batches_cut_otherwise_give_the_same(case, records):
    """Its gradients reach routers, and rows that only fill the batch do not count."""
    tokenized = [tokenize(row, case.processor, 2**20, 2**20) for row in records[:3]]
    sizes = {"prompt_sizes": (16,), "response_sizes": (10,)}
    padded = pad_batch(tokenized, case.processor, rows=4, **sizes)
    batch = tiny.train_batch(padded, np.zeros((4, 1), np.float32))
    mesh = one_device()
    metrics, whole = gradients(case, batch, mesh, 1, 0.5)
    parts_metrics, parts = gradients(case, batch, mesh, 2, 0.5)
    assert parts_metrics == pytest.approx(metrics, rel=1e-5)
    for path, change in whole.items():
        np.testing.assert_allclose(parts[path], change, rtol=0, atol=1e-5, err_msg=path)
    without_metrics, without = gradients(case, batch, mesh, 1, 0.0)
    assert AUX_LOSS not in without_metrics
    added = metrics["loss"] - without_metrics["loss"]
    assert added == pytest.approx(0.5 * metrics[AUX_LOSS], rel=1e-5)
    router = "language_model/layers/mlp/gate/kernel"
    assert np.abs(whole[router] - without[router]).max() > 1e-3
    _, found = checks.batch_of(case, records[:3])
    loads = response_statistics(case.model, case.params, found, loads=True)[LOADS]
    top_k = case.model.config.decoder.experts[0].top_k
    expected = float(load_balancing_loss(loads, top_k))
    assert metrics[AUX_LOSS] == pytest.approx(expected, rel=1e-5)


def test_a_mesh_gives_the_same(case, records):
    _, batch = checks.batch_of(case, [*records, *records])
    batch = tiny.train_batch(batch, np.zeros((8, 1), np.float32))
    expected_metrics, expected = gradients(case, batch, one_device(), 1, 0.5)
    metrics, found = gradients(case, batch, make_mesh(data=2, expert=2, tensor=2), 1, 0.5)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    for path, change in expected.items():
        close = 1e-5 * max(1, np.abs(change).max())
        np.testing.assert_allclose(found[path], change, rtol=0, atol=close, err_msg=path)


def test_a_dense_model_has_none(case, family_case):
    config = Training(objective={"type": "sft"}, router_aux_loss_coef=0.01)
    with pytest.raises(TrainingError, match="router_aux_loss_coef"):
        check_training(config, family_case("qwen3").model, one_device())
    check_training(config, case.model, one_device())
