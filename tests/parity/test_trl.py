"""DPO and SFT on a tiny LLaVA against TRL's trainer, fed with TRL's own collated batch."""

import copy
import functools

import jax
import numpy as np
import pytest
import tiny

from mmpo_jax.models.batch import Batch
from mmpo_jax.models.huggingface import load_model, to_huggingface
from mmpo_jax.objectives.sums import mean
from mmpo_jax.recipe import Dpo, Sft
from mmpo_jax.shapes.language import CAPTION_PROMPTS
from mmpo_jax.shapes.render import render
from mmpo_jax.shapes.world import sample_scene
from mmpo_jax.training.losses import REFERENCE, make_loss
from mmpo_jax.training.reference import score_batch

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from transformers import AutoProcessor, LlavaForConditionalGeneration  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

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
def folders(tiny_folder, tmp_path_factory):
    """(policy, reference)."""
    other = tiny.make_folder(tmp_path_factory.mktemp("reference") / "llava", seed=7)
    return tiny_folder, other


@pytest.fixture(scope="module")
def make_trainer(folders, tmp_path_factory):
    def make(beta):
        policy, reference = (
            LlavaForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
            for folder in folders
        )
        config = trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            beta=beta,
            max_length=None,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            report_to="none",
        )
        return trl.DPOTrainer(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=datasets.Dataset.from_list(list(rows())),
            processing_class=AutoProcessor.from_pretrained(folders[0]),
        )

    return make


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
    p, t = max(map(len, prompts)), max(map(len, responses))
    prompt_ids, prompt_mask = np.zeros((b, p), np.int32), np.zeros((b, p), bool)
    response_ids, response_mask = np.zeros((b, 2, t), np.int32), np.zeros((b, 2, t), bool)
    for i in range(b):
        prompt_ids[i, : len(prompts[i])], prompt_mask[i, : len(prompts[i])] = prompts[i], True
        for j in range(2):
            response = responses[j * b + i]
            response_ids[i, j, : len(response)] = response
            response_mask[i, j, : len(response)] = True
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        pixel_values=theirs["pixel_values"].numpy()[:b, None],
        **tiny.reading_order(prompt_ids, [len(ids) for ids in prompts[:b]]),
        response_ids=response_ids,
        response_mask=response_mask,
        loss_mask=response_mask,
        weights=np.ones(b, np.float32),
    )


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def loss_and_gradient(model, params, batch, fields, objective):
    def loss(params):
        sums = make_loss(model, objective, "none")(params, (batch, fields))
        metrics = {name: mean(*pair) for name, pair in sums.metrics.items()}
        return mean(sums.loss, sums.weight), metrics

    return jax.value_and_grad(loss, has_aux=True)(params)


def assert_same_gradients(model, gradient, theirs):
    """Ours as transformers names them against `.grad` of its parameters."""
    ours = {in_memory_name(key): value for key, value in to_huggingface(gradient, model)}
    parameters = dict(theirs.named_parameters())
    assert ours.keys() == parameters.keys()
    largest = max(np.abs(value).max() for value in ours.values())
    assert largest > 0.1
    for name, parameter in parameters.items():
        expected = 0 if parameter.grad is None else parameter.grad.numpy()
        np.testing.assert_allclose(
            ours[name], expected, rtol=0, atol=1e-5 * max(1, largest), err_msg=name
        )


def in_memory_name(key):
    if key.startswith("language_model.lm_head."):
        return key.removeprefix("language_model.")
    for old, new in (("language_model.model.", "language_model."), (".vision_model.", ".")):
        key = key.replace(old, new)
    return f"model.{key}"


def rms_norm(self, x):
    """`LlamaRMSNorm.forward` in the dtype of its input."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_equals_trl(folders, make_trainer, beta, monkeypatch):
    """In float64: rewards are small differences of sums near -100, which float32 rounds."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)  # theirs rounds to float32 inside
    trainer = make_trainer(beta)
    batch = dict(trainer.data_collator(copy.deepcopy([trainer.train_dataset[i] for i in range(3)])))
    batch["pixel_values"] = batch["pixel_values"].double()
    trainer.model.double().train()
    trainer.ref_model.double()
    expected = trainer.compute_loss(trainer.model, dict(batch))
    expected.backward()

    with jax.enable_x64(True):
        model, params = load_model(folders[0])
        params, reference_params = (
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
            for tree in (params, load_model(folders[1])[1])
        )
        ours = to_ours(batch)
        assert ours.response_mask.sum(-1).min() == 2  # "yes" and the end
        reference = score_batch(model, reference_params, ours, "float64")
        (loss, metrics), gradient = loss_and_gradient(
            model, params, ours, {REFERENCE: reference}, Dpo(beta=beta)
        )
        assert abs(float(loss) - np.log(2)) > 1e-2
        assert float(loss) == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
        assert_same_gradients(model, gradient, trainer.model)
    logged = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    for name, value in metrics.items():
        assert float(value) == pytest.approx(logged[name], rel=1e-5, abs=1e-6), name


def test_sft_loss_is_the_mean_token_nll(folders, make_trainer):
    trainer = make_trainer(0.1)
    batch = dict(trainer.data_collator(copy.deepcopy([trainer.train_dataset[i] for i in range(3)])))
    theirs = LlavaForConditionalGeneration.from_pretrained(
        folders[0], dtype=torch.float32, attn_implementation="eager"
    )
    completion = batch.pop("completion_mask")
    labels = batch["input_ids"].masked_fill(completion == 0, -100)
    expected = theirs(**batch, labels=labels).loss
    expected.backward()
    model, params = load_model(folders[0])
    ours = to_ours(batch | {"completion_mask": completion})
    (loss, metrics), gradient = loss_and_gradient(model, params, ours, {}, Sft())
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert float(metrics["nll_loss"]) == float(loss)
    assert_same_gradients(model, gradient, theirs)
