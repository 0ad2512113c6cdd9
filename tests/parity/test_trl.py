"""Every loss of TRL's DPO trainer on a tiny LLaVA, fed with TRL's own collated batch.

In float64: losses are of small differences of sums near -50, which float32 rounds to 1e-6 or so.
"""

import copy
import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from helpers.against_trl import assert_same_gradients, make_batch

from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.models.batch import Batch
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.picture_world.language import CAPTION_PROMPTS
from mmpo_jax.picture_world.render import render
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.scoring.log_probs import score_batch
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.metrics import means

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from transformers import AutoProcessor, LlavaForConditionalGeneration  # noqa: E402

pytestmark = pytest.mark.parity

RESPONSES = [
    ("there is a red star", "there is a blue ring in the picture"),
    ("yes", "no"),
    ("a green square and a red ring", "a star"),
]


def rows():
    for i, (chosen, rejected) in enumerate(RESPONSES):
        yield {
            "images": [render(sample_scene("train", 0, i))],
            "prompt": [{"role": "user", "content": CAPTION_PROMPTS[i % len(CAPTION_PROMPTS)]}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


@pytest.fixture(scope="module")
def theirs(close_folders, tmp_path_factory):
    """(policy, reference, options -> trainer), in float64."""
    policy, reference = (
        LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        )
        for folder in close_folders
    )
    processor = AutoProcessor.from_pretrained(close_folders[0])
    dataset = datasets.Dataset.from_list(list(rows()))
    output_dir = str(tmp_path_factory.mktemp("trl"))

    def make(**options):
        config = trl.DPOConfig(
            output_dir=output_dir,
            max_length=None,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            report_to="none",
            **options,
        )
        return trl.DPOTrainer(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=dataset,
            processing_class=processor,
        )

    return policy, make


@pytest.fixture(scope="module")
def batch(theirs):
    """As TRL collates it."""
    trainer = theirs[1]()
    rows = copy.deepcopy([trainer.train_dataset[i] for i in range(len(RESPONSES))])
    collated = dict(trainer.data_collator(rows))
    return collated | {"pixel_values": collated["pixel_values"].double()}


@dataclasses.dataclass(frozen=True)
class Ours:
    """The same batch here: the model runs once, and every loss is one of its outputs."""

    model: Any
    batch: TrainBatch
    outputs: dict[str, jax.Array]
    pull_back: Any
    """Slopes by outputs -> the gradient."""


@pytest.fixture(scope="module")
def ours(close_folders, batch):
    with jax.enable_x64(True):
        model, params = load_model(close_folders[0])
        params, reference_params = (
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
            for tree in (params, load_model(close_folders[1])[1])
        )
        prompts = to_ours(batch)
        assert prompts.response_mask.sum(-1).min() == 2  # "yes" and the end
        reference = score_batch(model, reference_params, prompts, "float64", per_token=True)
        ranks = np.tile(np.float32([1, 2]), (len(RESPONSES), 1))
        whole = TrainBatch(prompts, {"log_probs": reference}, {"rank": ranks})
        forward = make_loss(model, [make_term("dpo", wpo=True)]).forward
        outputs = jax.jit(lambda params: forward(params, None, whole))(params)

        @jax.jit
        def pull_back(slopes):
            return jax.vjp(lambda params: forward(params, None, whole), params)[1](slopes)[0]

        yield Ours(model, whole, outputs, pull_back)


def to_ours(theirs) -> Batch:
    """TRL's [chosen..., rejected...] rows as shared prompts with two responses each."""
    ids, attended, completion = (
        theirs[name].numpy() for name in ("input_ids", "attention_mask", "completion_mask")
    )
    b = len(ids) // 2
    prompts = [
        row[(a == 1) & (c == 0)] for row, a, c in zip(ids, attended, completion, strict=True)
    ]
    responses = [row[c == 1] for row, c in zip(ids, completion, strict=True)]
    for i in range(b):
        np.testing.assert_array_equal(prompts[i], prompts[b + i])
    pairs = [[responses[i], responses[b + i]] for i in range(b)]
    return make_batch(prompts[:b], pairs, theirs["pixel_values"].numpy()[:b])


LOSSES = {  # TRL's options -> ours, a list where there are several
    "sigmoid": ({"loss_type": ["sigmoid"]}, [("dpo", 1, {})]),
    "beta": ({"loss_type": ["sigmoid"], "beta": 0.5}, [("dpo", 1, {"beta": 0.5})]),
    "hinge": ({"loss_type": ["hinge"]}, [("hinge", 1, {})]),
    "ipo": ({"loss_type": ["ipo"], "beta": 0.3}, [("ipo", 1, {"beta": 0.3})]),
    "exo_pair": (
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3, "beta": 0.5},
        [("exo_pair", 1, {"beta": 0.5})],
    ),
    "nca_pair": ({"loss_type": ["nca_pair"]}, [("nca_pair", 1, {})]),
    "robust": (
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        [("robust", 1, {"label_smoothing": 0.2})],
    ),
    "bco_pair": ({"loss_type": ["bco_pair"]}, [("bco_pair", 1, {})]),
    "sppo_hard": ({"loss_type": ["sppo_hard"], "beta": 0.5}, [("sppo_hard", 1, {"beta": 0.5})]),
    "aot": ({"loss_type": ["aot"]}, [("aot", 1, {})]),
    "aot smoothed": (
        {"loss_type": ["aot"], "label_smoothing": 0.2},
        [("aot", 1, {"label_smoothing": 0.2})],
    ),
    "aot_unpaired": ({"loss_type": ["aot_unpaired"]}, [("aot_unpaired", 1, {})]),
    "aot_unpaired smoothed": (
        {"loss_type": ["aot_unpaired"], "label_smoothing": 0.2, "beta": 0.3},
        [("aot_unpaired", 1, {"label_smoothing": 0.2, "beta": 0.3})],
    ),
    "apo_zero": ({"loss_type": ["apo_zero"]}, [("apo_zero", 1, {})]),
    "apo_down": ({"loss_type": ["apo_down"]}, [("apo_down", 1, {})]),
    "discopop": ({"loss_type": ["discopop"]}, [("discopop", 1, {})]),
    "discopop tau": (
        {"loss_type": ["discopop"], "discopop_tau": 0.5},
        [("discopop", 1, {"tau": 0.5})],
    ),
    "sft": ({"loss_type": ["sft"]}, [("sft", 1, {})]),
    "sigmoid_norm": (
        {"loss_type": ["sigmoid_norm"], "beta": 2},
        [("sigmoid_norm", 1, {"beta": 2})],
    ),
    "InternVL's MPO": (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        [("dpo", 0.8, {}), ("bco_pair", 0.2, {}), ("sft", 1.0, {})],
    ),
    "apo and sft": (
        {"loss_type": ["apo_zero", "sft"], "loss_weights": [2.0, 0.3]},
        [("apo_zero", 2.0, {}), ("sft", 0.3, {})],
    ),
    "LD-DPO": ({"ld_alpha": 0.4}, [("dpo", 1, {"ld_alpha": 0.4})]),
    "LD-DPO prefix": (
        {"ld_alpha": 0.0, "loss_type": ["ipo"], "beta": 0.3},
        [("ipo", 1, {"ld_alpha": 0.0, "beta": 0.3})],
    ),
    "WPO": ({"use_weighting": True}, [("dpo", 1, {"wpo": True})]),
    "WPO list": (
        {"use_weighting": True, "loss_type": ["ipo", "apo_zero"], "loss_weights": [0.5, 2.0]},
        [("ipo", 0.5, {"wpo": True}), ("apo_zero", 2.0, {"wpo": True})],
    ),
    "LD-DPO with WPO": (
        {"use_weighting": True, "ld_alpha": 0.4},
        [("dpo", 1, {"wpo": True, "ld_alpha": 0.4})],
    ),
}
DIVERGENCES = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
}
DIVERGED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
"""The losses for which TRL allows them."""
for divergence, their_options in DIVERGENCES.items():
    for loss in DIVERGED:
        options, ((kind, weight, given),) = LOSSES[loss]
        given = given | {"divergence": divergence, "divergence_alpha": 0.7}
        LOSSES[f"{loss} {divergence}"] = (options | their_options, [(kind, weight, given)])


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.slow
def test_loss_equals_trl(theirs, batch, ours, case, monkeypatch):
    options, terms = LOSSES[case]
    policy, make_trainer = theirs
    trainer = make_trainer(**options)
    policy.train().zero_grad()
    with monkeypatch.context() as patch:
        # Their norms and head compute in float32, whatever the parameters are: not so here.
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        expected = trainer.compute_loss(policy, dict(batch))
        expected.backward()

    with jax.enable_x64(True):
        terms = [make_term(kind, weight, **given) for kind, weight, given in terms]
        loss = make_loss(ours.model, terms)

        def value(outputs):
            sums, _ = loss.sums(outputs, ours.batch, loss.state)
            return loss.value(sums), loss.metrics(sums)

        (found, metrics), slopes = jax.value_and_grad(value, has_aux=True)(ours.outputs)
        assert float(found) == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
        assert_same_gradients(ours.model, ours.pull_back(slopes), policy, at_least=1e-3)
    logged = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    metrics = means([metrics])
    for name, number in metrics.items():
        if name in logged:
            assert number == pytest.approx(logged[name], rel=1e-5, abs=1e-6), name
    assert {"rewards/margins", "logps/chosen"} <= metrics.keys() or case == "sft"


def test_sft_equals_the_loss_of_transformers(close_folders, batch, ours):
    """Which TRL's `sft` is not: it has the chosen responses only, and this both."""
    theirs = LlavaForConditionalGeneration.from_pretrained(
        close_folders[0], dtype=torch.float64, attn_implementation="eager"
    )
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    expected = theirs(**inputs, labels=labels).loss
    with jax.enable_x64(True):
        loss = make_loss(ours.model, [make_term("sft")])
        unranked = dataclasses.replace(ours.batch, fields={})
        sums, _ = loss.sums(ours.outputs, unranked, {})
    # Their norms round to float32.
    assert float(loss.value(sums)) == pytest.approx(expected.item(), rel=1e-6)
    assert means([loss.metrics(sums)])["nll_loss"] == pytest.approx(float(loss.value(sums)))
