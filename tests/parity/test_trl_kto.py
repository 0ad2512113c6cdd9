"""KTO on a tiny LLaVA against TRL's trainer, fed with TRL's own collated batch."""

import copy

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.against_trl import (
    ON_CPU,
    as_float64,
    assert_same_gradients,
    loss_and_gradient,
    make_batch,
    rms_norm,
    their_model,
)

from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.picture_world.language import CAPTION_PROMPTS
from mmpo_jax.picture_world.render import render
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.scoring.log_probs import score_batch

pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from transformers import AutoProcessor  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

pytestmark = pytest.mark.parity

ANSWERS = [
    ("there is a red star", True),
    ("no", False),
    ("a green square and a red ring", False),
    ("a blue ring", True),
]


def rows():
    for i, (answer, desirable) in enumerate(ANSWERS):
        yield {
            "images": [render(sample_scene("train", 0, i))],
            "prompt": [{"role": "user", "content": CAPTION_PROMPTS[i % len(CAPTION_PROMPTS)]}],
            "completion": [{"role": "assistant", "content": answer}],
            "label": desirable,
        }


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """(policy, reference)."""
    other = tiny.make_folder(tmp_path_factory.mktemp("reference") / "llava", seed=7)
    return tiny_folder, other


@pytest.fixture(scope="module")
def make_trainer(folders, tmp_path_factory):
    def make(order, **options):
        """The first of `order` is the policy."""
        policy, reference = (their_model(folders[i]) for i in order)
        config = trl.KTOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            max_length=None,
            per_device_train_batch_size=len(ANSWERS),
            remove_unused_columns=False,
            **ON_CPU,
            **options,
        )
        return trl.KTOTrainer(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=datasets.Dataset.from_list(list(rows())),
            processing_class=AutoProcessor.from_pretrained(folders[0]),
        )

    return make


def to_ours(theirs):
    """TRL's rows, each with its own and its mismatched completion, as two responses to a prompt."""

    def split(prefix):
        names = ("input_ids", "attention_mask", "completion_mask")
        columns = [theirs[prefix + name].numpy() for name in names]
        return [(ids[(a == 1) & (c == 0)], ids[c == 1]) for ids, a, c in zip(*columns, strict=True)]

    own = split("")
    others = (
        split("KL_") if "KL_input_ids" in theirs else [(prompt, ids[:0]) for prompt, ids in own]
    )
    for (prompt, _), (same, _) in zip(own, others, strict=True):
        np.testing.assert_array_equal(prompt, same)
    responses = [[ids, other] for (_, ids), (_, other) in zip(own, others, strict=True)]
    return make_batch([prompt for prompt, _ in own], responses, theirs["pixel_values"].numpy())


@pytest.mark.parametrize(
    ("name", "order", "options"),
    [
        ("kto", (0, 1), {"beta": 0.1}),
        ("kto", (1, 0), {"beta": 0.02, "desirable_weight": 1.3, "undesirable_weight": 0.7}),
        ("apo_zero_unpaired", (0, 1), {"beta": 0.1}),
    ],
)
@pytest.mark.slow
def test_kto_equals_trl(name, order, options, folders, make_trainer, monkeypatch):
    """In float64: log-ratios are small differences of sums near -100, which float32 rounds."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    trainer = make_trainer(order, loss_type=name, **options)
    rows = copy.deepcopy([trainer.train_dataset[i] for i in range(len(ANSWERS))])
    batch = dict(trainer.data_collator(rows))
    batch["pixel_values"] = batch["pixel_values"].double()
    trainer.model.double().train()
    trainer.ref_model.double()
    expected = trainer.compute_loss(trainer.model, dict(batch))
    expected.backward()

    with jax.enable_x64(True):
        model, params = load_model(folders[order[0]])
        params = as_float64(params)
        reference = as_float64(load_model(folders[order[1]])[1])
        ours = to_ours(batch)
        labels = batch["label"].numpy()[:, None]
        fields = {
            "desirable": np.repeat(labels, 2, axis=1).astype(float),
            "mismatched": np.tile([0.0, 1.0], (len(labels), 1)),
        }
        sums = {"sums": score_batch(model, reference, ours, "float64")}
        term = make_term(name, **options)
        loss, metrics, gradient = loss_and_gradient(
            model, params, TrainBatch(ours, sums, fields), term
        )
        assert float(loss) == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
        assert_same_gradients(model, gradient, trainer.model)
    logged = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    if name == "kto":
        assert (metrics["kl"] > 0) == (order == (1, 0))
    assert "rewards/margins" in metrics
    for name, value in metrics.items():
        assert value == pytest.approx(logged[name], rel=1e-5, abs=1e-6), name
