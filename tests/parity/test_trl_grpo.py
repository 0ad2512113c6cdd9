"""GRPO on a tiny LLaVA against TRL's trainer, on the completions that it sampled and scored."""

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.against_trl import (
    as_float64,
    assert_same_gradients,
    loss_and_gradient,
    make_batch,
    rms_norm,
)

from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.data.pipeline import TrainBatch
from mmpo_jax.objectives.on_policy import advantages
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.picture_world.language import CAPTION_PROMPTS
from mmpo_jax.picture_world.render import render
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.scoring.log_probs import score_batch
from mmpo_jax.training.on_policy import reward_metrics

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from transformers import AutoProcessor, LlavaForConditionalGeneration  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

pytestmark = pytest.mark.parity

PROMPTS, SAMPLES, LIMIT = 2, 4, 6
WEIGHTS = [1.0, 0.5]


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """(policy, reference); saved by transformers, the second names its class."""
    other = tiny.make_folder(tmp_path_factory.mktemp("reference") / "llava", seed=7)
    model = LlavaForConditionalGeneration.from_pretrained(other, dtype=torch.float32)
    model.save_pretrained(other.parent / "saved")
    return tiny_folder, other.parent / "saved"


@pytest.fixture(scope="module")
def make_trainer(folders, tmp_path_factory):
    def make(**options):
        policy = LlavaForConditionalGeneration.from_pretrained(
            folders[0], dtype=torch.float32, attn_implementation="eager"
        )
        policy.config._name_or_path = str(folders[1])  # where the trainer takes its reference from
        given = []
        rng = np.random.default_rng(0)

        def draw(completions, **_):
            given.append(rng.standard_normal(len(completions)).tolist())
            return given[-1]

        def count(completions, **_):
            given.append([float(len(turns[0]["content"]) % 3) for turns in completions])
            return given[-1]

        config = trl.GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=LIMIT,
            num_iterations=2,
            reward_weights=WEIGHTS,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            seed=1,
            **options,
        )
        # One length of prompts: where theirs are padded on the left, float64 has no finite softmax.
        rows = [
            {
                "image": render(sample_scene("train", 0, i)),
                "prompt": [{"role": "user", "content": CAPTION_PROMPTS[0]}],
            }
            for i in range(PROMPTS)
        ]
        trainer = trl.GRPOTrainer(
            model=policy,
            reward_funcs=[draw, count],
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoProcessor.from_pretrained(folders[0]),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        repeated = [dict(trainer.train_dataset[i]) for i in range(PROMPTS) for _ in range(SAMPLES)]
        inputs = trainer._generate_and_score_completions(repeated)
        return trainer, inputs, np.array(given).T

    return make


def to_ours(theirs):
    """TRL's rows as prompts with `SAMPLES` responses; log-probs padded alike."""
    columns = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    prompts, prompt_mask, ids, mask = (theirs[name].numpy() for name in columns)
    prompts = [row[m == 1] for row, m in zip(prompts, prompt_mask, strict=True)]
    responses = [row[m == 1] for row, m in zip(ids, mask, strict=True)]
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(prompt, prompts[row // SAMPLES * SAMPLES])
    grouped = [responses[i : i + SAMPLES] for i in range(0, len(responses), SAMPLES)]
    return make_batch(prompts[::SAMPLES], grouped, theirs["pixel_values"].numpy()[::SAMPLES])


def per_token(values, batch):
    shape = (PROMPTS, SAMPLES, -1)
    return values.double().numpy().reshape(shape) * batch.response_mask


@pytest.mark.parametrize(
    ("options", "term"),
    [
        ({"loss_type": "dapo"}, {}),
        ({"loss_type": "dapo", "beta": 0.2}, {}),
        ({"loss_type": "bnpo", "epsilon_high": 0.3}, {}),
        (
            {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
            {"bias_corrected_kl": False},
        ),
        ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {"max_tokens": LIMIT}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"ratio": "sequence"}),
        ({"loss_type": "dapo", "beta": 0.3, "scale_rewards": "batch"}, {}),
        ({"loss_type": "dapo", "beta": 0.2, "temperature": 0.7}, {}),
        ({"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"}, {}),
    ],
)
@pytest.mark.slow
def test_grpo_equals_trl(options, term, folders, make_trainer, monkeypatch):
    trainer, inputs, rewards = make_trainer(**options)
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    # Random weights never end: some completions are cut as if they had. What is old lies beyond
    # the clipping on both sides, and everything is float64.
    for row, length in ((1, 3), (4, 1), (6, 5)):
        inputs["completion_mask"][row, length:] = 0
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    temperature = options.get("temperature", 1.0)
    batch = to_ours(inputs)
    model, params = load_model(folders[0])
    np.testing.assert_allclose(
        score_batch(model, params, batch, per_token=True, temperature=temperature),
        per_token(inputs["old_per_token_logps"], batch),
        atol=2e-5,
    )
    noise = torch.randn(inputs["old_per_token_logps"].shape, generator=torch.manual_seed(0))
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"].double() + 0.3 * noise
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.dtype == torch.float32:
            inputs[name] = value.double()
    trainer.model.double()
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()

    batch = to_ours(inputs)
    assert set(batch.response_mask.sum(-1).flat) == {1, 3, 5, LIMIT}
    with jax.enable_x64(True):
        model, params = load_model(folders[0])
        scale, aggregation = (
            options.get("scale_rewards", "group"),
            options.get("multi_objective_aggregation", "sum_then_normalize"),
        )
        grouped = rewards.reshape(PROMPTS, SAMPLES, 2)
        ours = advantages(grouped, WEIGHTS, scale=scale, aggregation=aggregation)
        theirs = inputs["advantages"].numpy().reshape(PROMPTS, SAMPLES)
        np.testing.assert_allclose(ours, theirs, atol=2e-6)  # theirs are made in float32
        fields = {
            "advantages": theirs,
            "old_log_probs": per_token(inputs["old_per_token_logps"], batch),
        }
        reference = {}
        if options.get("beta"):
            reference = {"log_probs": per_token(inputs["ref_per_token_logps"], batch)}
        term = make_term(
            "grpo",
            normalization=options["loss_type"],
            beta=options.get("beta", 0.0),
            epsilon_high=options.get("epsilon_high", 0.2),
            **term,
        )
        loss, metrics, gradient = loss_and_gradient(
            model,
            as_float64(params),
            TrainBatch(batch, reference, fields),
            term,
            temperature=temperature,
        )
        assert float(loss) == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
        assert_same_gradients(model, gradient, trainer.model)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert 0 < metrics["clip_ratio/region_mean"] < 1
    metrics.pop("completions/mean_length")  # theirs is that of the completions before the cut
    for name, value in metrics.items():
        assert value == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name


def test_metrics_of_rewards_equal_trl(make_trainer):
    """Of two rewards with weights, over all samples."""
    trainer, _, rewards = make_trainer()
    logged = trainer._metrics["train"]
    ours = reward_metrics(
        rewards.reshape(PROMPTS, SAMPLES, 2), dict(zip(("draw", "count"), WEIGHTS, strict=True))
    )
    assert len(ours) == 7
    for name, value in ours.items():
        assert value == pytest.approx(logged[name][-1], rel=1e-5), name
