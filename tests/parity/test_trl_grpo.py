"""GRPO and RLOO on a tiny LLaVA against TRL, on the completions that its trainers sampled."""

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
from mmpo_jax.objectives.advantages import advantages
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.scoring.log_probs import score_batch
from mmpo_jax.training.metrics import means
from mmpo_jax.training.rollout_rewards import reward_metrics

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from transformers import AutoProcessor  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

pytestmark = pytest.mark.parity

PROMPTS, SAMPLES, LIMIT = 2, 4, 6
WEIGHTS = [1.0, 0.5]


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """(policy, reference); saved by transformers, the second names its class."""
    other = tiny.make_folder(tmp_path_factory.mktemp("reference") / "llava", seed=7)
    their_model(other).save_pretrained(other.parent / "saved")
    return tiny_folder, other.parent / "saved"


@pytest.fixture(scope="module")
def make_trainer(folders, tmp_path_factory):
    def make(kind="GRPO", **options):
        policy = their_model(folders[0])
        policy.config._name_or_path = str(folders[1])  # where the trainer takes its reference from
        given = []
        rng = np.random.default_rng(0)

        def draw(completions, **_):
            given.append(rng.standard_normal(len(completions)).tolist())
            return given[-1]

        def count(completions, **_):
            given.append([float(len(turns[0]["content"]) % 3) for turns in completions])
            return given[-1]

        config = getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=LIMIT,
            num_iterations=2,
            reward_weights=WEIGHTS,
            seed=1,
            **ON_CPU,
            **options,
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model=policy,
            reward_funcs=[draw, count],
            args=config,
            train_dataset=datasets.Dataset.from_list(prompt_rows(PROMPTS)),
            processing_class=AutoProcessor.from_pretrained(folders[0]),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        repeated = [dict(trainer.train_dataset[i]) for i in range(PROMPTS) for _ in range(SAMPLES)]
        inputs = trainer._generate_and_score_completions(repeated)
        return trainer, inputs, np.array(given).T

    return make


def per_token(values, batch):
    shape = (PROMPTS, SAMPLES, -1)
    return values.double().numpy().reshape(shape) * batch.response_mask


NAMES = {"cispo": "cispo", "sapo": "sapo"}
"""Our name of TRL's loss types; others are `grpo` by its normalization."""


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
        ({"loss_type": "cispo", "epsilon_high": 1.1}, {"max_weight": 1.1}),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.1}, {"max_weight": 5.0}),
        (
            {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.4},
            {"positive_temperature": 0.8, "negative_temperature": 1.4, "normalization": "grpo"},
        ),
        (
            {"loss_type": "sapo", "beta": 0.2, "importance_sampling_level": "sequence"},
            {"ratio": "sequence", "normalization": "grpo"},
        ),
        ({"loss_type": "dapo", "delta": 1.3}, {"delta": 1.3}),
        ({"loss_type": "grpo", "delta": 1.25, "beta": 0.1}, {"delta": 1.25}),
        (
            {"loss_type": "dapo", "top_entropy_quantile": 0.3, "beta": 0.1},
            {"top_entropy_quantile": 0.3},
        ),
        ({"loss_type": "dapo", "mask_truncated_completions": True}, {}),
        ({"loss_type": "grpo", "mask_truncated_completions": True, "beta": 0.1}, {}),
    ],
)
@pytest.mark.slow
def test_grpo_equals_trl(options, term, folders, make_trainer, monkeypatch):
    # Random weights never end, so all completions are cut, and theirs would have no tokens.
    masks = options.get("mask_truncated_completions", False)
    without = {k: v for k, v in options.items() if k != "mask_truncated_completions"}
    trainer, inputs, rewards = make_trainer(**without)
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    # Random weights never end: some completions are cut as if they had. What is old lies beyond
    # the clipping on both sides, and everything is float64.
    for row, length in ((1, 3), (4, 1), (6, 5)):
        inputs["completion_mask"][row, length:] = 0
    truncated = np.zeros((PROMPTS, SAMPLES))
    if masks:  # as if two of the others had been cut, masked as theirs are
        truncated.flat[[3, 5]] = 1
    whole = {**inputs, "completion_mask": inputs["completion_mask"].clone()}
    inputs["completion_mask"][truncated.ravel() == 1] = 0
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    temperature = options.get("temperature", 1.0)
    batch = sampled_batch(whole, SAMPLES)
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

    batch = sampled_batch(whole, SAMPLES)
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
            "truncated": truncated,
        }
        reference = {}
        if options.get("beta"):
            reference = {"log_probs": per_token(inputs["ref_per_token_logps"], batch)}
        name, kind = NAMES.get(options["loss_type"], "grpo"), options["loss_type"]
        own = {"epsilon_high": options.get("epsilon_high", 0.2), "normalization": kind}
        own = own if name == "grpo" else {}
        term = make_term(name, beta=options.get("beta", 0.0), **own, **term)
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
    if name == "grpo":
        assert 0 < metrics["clip_ratio/region_mean"] < 1
    metrics.pop("completions/mean_length")  # theirs is that of the completions before the cut
    for name, value in metrics.items():
        assert value == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name


def test_metrics_of_rewards_equal_trl(make_trainer):
    """Of two rewards with weights, over all samples."""
    trainer, _, rewards = make_trainer()
    logged = trainer._metrics["train"]
    weights = dict(zip(("draw", "count"), WEIGHTS, strict=True))
    ours = means([reward_metrics(rewards.reshape(PROMPTS, SAMPLES, 2), weights)])
    assert {ours.pop(f"rewards/{name}/missing_ratio") for name in weights} == {0.0}
    assert len(ours) == 7
    for name, value in ours.items():
        assert value == pytest.approx(logged[name][-1], rel=1e-5), name


@pytest.mark.parametrize("options", [{}, {"normalize_advantages": True, "epsilon_high": 0.3}])
@pytest.mark.slow
def test_rloo_equals_trl(options, folders, make_trainer, monkeypatch):
    """Advantages with the penalty that leaving the reference costs, loss and gradient."""
    trainer, inputs, rewards = make_trainer("RLOO", beta=0.3, **options)
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    batch = sampled_batch(inputs, SAMPLES)
    sums = []
    for folder in folders:
        model, params = load_model(folder)
        sums.append(np.asarray(score_batch(model, params, batch)))
    grouped = rewards.reshape(PROMPTS, SAMPLES, 2)
    scale = "whiten" if options else "none"
    ours = advantages(
        grouped, WEIGHTS, baseline="leave_one_out", scale=scale, penalty=0.3 * (sums[0] - sums[1])
    )
    theirs = inputs["advantages"].numpy().reshape(PROMPTS, SAMPLES)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(sums[0].ravel(), inputs["old_logps"], atol=2e-5)
    # What is old lies beyond the clipping on both sides, and everything is float64.
    moved = 0.3 * torch.randn(PROMPTS * SAMPLES, generator=torch.manual_seed(0)).double()
    inputs["old_logps"] = inputs["old_logps"].double() + moved
    inputs["advantages"] = inputs["advantages"].double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    trainer.model.double()
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()
    with jax.enable_x64(True):
        model, params = load_model(folders[0])
        params = as_float64(params)
        # The same sum, all of whose difference lies in the first token.
        old = np.array(score_batch(model, params, batch, per_token=True))
        old[..., 0] += inputs["old_logps"].numpy().reshape(PROMPTS, SAMPLES) - old.sum(-1)
        term = make_term(
            "grpo",
            ratio="trajectory",
            normalization="grpo",
            epsilon_high=options.get("epsilon_high", 0.2),
        )
        fields = {"advantages": theirs.astype(np.float64), "old_log_probs": old}
        loss, metrics, gradient = loss_and_gradient(
            model, params, TrainBatch(batch, {}, fields), term
        )
        # Theirs sums log-probs of a kernel in float32.
        assert float(loss) == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        assert_same_gradients(model, gradient, trainer.model)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert 0 < metrics["clip_ratio/region_mean"] < 1
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        assert metrics[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name
