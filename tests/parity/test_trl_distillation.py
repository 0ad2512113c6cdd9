"""Distillation on a tiny LLaVA against TRL's trainers, from a teacher of another shape."""

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.against_trl import (
    ON_CPU,
    as_float64,
    assert_same_gradients,
    loss_and_gradient,
    prompt_rows,
    rms_norm,
    sampled_batch,
    their_model,
)

from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.objectives.terms import make_term

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from transformers import AutoProcessor  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402

pytestmark = pytest.mark.parity

PROMPTS, LIMIT = 4, 6


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """(student, teacher): the second is wider and deeper."""
    larger = tiny.make_config(
        vision={"hidden_size": 24}, text={"hidden_size": 40, "num_hidden_layers": 3}
    )
    return tiny_folder, tiny.make_folder(tmp_path_factory.mktemp("teacher") / "llava", larger, 7)


@pytest.fixture(scope="module")
def sampled(folders, tmp_path_factory):
    """(trainer, what it sampled): completions of several lengths."""
    config = trl.DistillationConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=PROMPTS,
        max_completion_length=LIMIT,
        seed=1,
        **ON_CPU,
    )
    trainer = trl.DistillationTrainer(
        model=their_model(folders[0]),
        teacher_model=their_model(folders[1]),
        args=config,
        train_dataset=datasets.Dataset.from_list(prompt_rows(PROMPTS)),
        processing_class=AutoProcessor.from_pretrained(folders[0]),
    )
    trainer.model.train()
    inputs = trainer._generate_and_score_completions(
        [dict(trainer.train_dataset[i]) for i in range(PROMPTS)]
    )
    for row, length in ((0, 2), (2, 5)):
        inputs["completion_mask"][row, length:] = 0
    return trainer, inputs


def ours(folders, inputs, term, temperature=1.0, dtype=None):
    """(model, loss, metrics, gradient)."""
    batch = sampled_batch(inputs)
    (model, params), (teacher, of_teacher) = map(load_model, folders)
    if dtype is not None:
        params, of_teacher = as_float64(params), as_float64(of_teacher)
    train = TrainBatch(batch, {}, {}, batch)
    found = loss_and_gradient(
        model, params, train, term, temperature=temperature, teacher=(teacher, of_teacher)
    )
    return model, *found


@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (0.0, 1.0), (0.5, 1.0), (0.2, 0.7)])
@pytest.mark.slow
def test_equals_the_distillation_trainer(beta, temperature, folders, sampled):
    """Which has a kernel of its own, in float32."""
    trainer, inputs = sampled
    trainer.model.float().zero_grad()
    trainer.teacher_model.float()
    trainer.beta, trainer.temperature = beta, temperature
    count = inputs["completion_mask"].sum()
    expected, entropy, _ = trainer._compute_loss(trainer.model, inputs, count)
    expected.backward()
    term = make_term("distillation", beta=beta)
    model, loss, metrics, gradient = ours(folders, inputs, term, temperature)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    assert float(loss) > 0.1 and metrics["divergence"] == pytest.approx(float(loss))
    assert entropy > 0
    assert_same_gradients(model, gradient, trainer.model)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.slow
def test_equals_gkd(beta, folders, sampled, monkeypatch):
    """Whose loss is of whole logits, in float64."""
    trainer, inputs = sampled
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    student = trainer.model.double()
    student.zero_grad()
    logits = [logits_of(model, inputs) for model in (student, trainer.teacher_model.double())]
    mask = inputs["completion_mask"].bool()
    labels = torch.where(mask, inputs["completion_ids"], -100)
    expected = GKDTrainer.generalized_jsd_loss(
        logits[0], logits[1].detach(), labels, beta=beta, num_items_in_batch=mask.sum()
    )
    expected.backward()
    with jax.enable_x64(True):
        term = make_term("distillation", beta=beta)
        model, loss, _, gradient = ours(folders, inputs, term, dtype=np.float64)
        assert float(loss) == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
        assert_same_gradients(model, gradient, student)


def logits_of(model, inputs):
    """That predict the completions."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    pixels = inputs["pixel_values"].double()
    found = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    return found[:, -inputs["completion_ids"].shape[1] - 1 : -1]
