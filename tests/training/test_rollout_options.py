"""Options of rollouts: minibatches, which prompts and samples teach, penalties, masked images."""

import jax
import numpy as np
import pytest
from helpers import meshes
from helpers.loop_runs import Killed, interrupted, make_start
from helpers.rollouts import State, easy_rewards, tokenized_prompts, trained
from helpers.run_files import reproducible_rows

from mmpo_jax.data.examples import Examples
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.data.tokenized_rows import known
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.objectives.advantages import advantages
from mmpo_jax.recipes.optimizers import AdamW
from mmpo_jax.recipes.rewards import RewardSection
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.training import Training
from mmpo_jax.rewards.registry import Value
from mmpo_jax.training.metrics import read_metrics
from mmpo_jax.training.on_policy import Prompts, Rollouts
from mmpo_jax.training.plan import total_steps

LENGTHS = Lengths(prompt=(24,), response=(4, 8))
PROMPTS = 6
OPTIONS = {
    "rewards": [{"type": "picture_world_caption"}],
    "num_samples": 4,
    "max_new_tokens": 6,
}
CONFIG = Training(
    objective={"type": "grpo"},
    optimizer=AdamW(learning_rate=1e-2, weight_decay=0.0),
    epochs=4,
    batch_size=2,
    micro_batch_size=2,
    log_every=1,
    save_every=4,
)


@pytest.fixture(scope="module")
def records(tiny_processor):
    return tokenized_prompts(tiny_processor, LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def rewards():
    with easy_rewards():
        yield


@pytest.fixture
def rollouts(tiny_model, tiny_processor, records, mesh):
    def make(config=CONFIG, mesh=mesh, **options):
        start = make_start(tiny_model, tiny_processor)
        prompts = Prompts(records, [MixtureEntry(len(records))], seed=3)
        rollout = Rollout(**OPTIONS | options)
        return Rollouts(start, prompts, config, rollout, LENGTHS, mesh, config.micro_batch_size)

    return make


def flat(arrays):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)


def test_minibatches_come_again_in_order(rollouts, tiny_model):
    """Advantages are those of the whole rollout, old log-probs those of what sampled it."""
    model, params = tiny_model
    source = rollouts(minibatches=2, num_iterations=2, scale="batch")
    state = State(params)
    drawn = [source.draw(state) for _ in range(4)]
    assert drawn[2] is drawn[0] and drawn[3] is drawn[1]
    assert len({*drawn[0].ids, *drawn[1].ids}) == 4
    assert source.can_resume() and source.draw(state) is not drawn[0]
    rewards, found = [], []
    for host in drawn[:2]:
        arrays = flat(host.arrays)
        found.append(arrays.fields["advantages"])
        log_probs = response_log_probs(model, params, arrays.prompts) * arrays.prompts.loss_mask
        np.testing.assert_allclose(arrays.fields["old_log_probs"], log_probs, rtol=1e-5, atol=1e-5)
        for row in range(2):
            ids = arrays.prompts.response_ids[row]
            texts = [
                source.start.processor.decode(ids[i][arrays.prompts.loss_mask[row, i]].tolist())
                for i in range(4)
            ]
            rewards.append([[text.count("a") - text.count("e")] for text in texts])
    wanted = advantages(np.array(rewards, np.float32), [1.0], scale="batch")
    np.testing.assert_allclose(np.concatenate(found), wanted, atol=1e-5)


def test_steps_of_rollouts():
    rollout = Rollout(**OPTIONS, minibatches=2, num_iterations=3)
    # 24 prompts in rollouts of 4, each learned from in 2 x 3 steps.
    assert total_steps(CONFIG, [MixtureEntry(PROMPTS)], rollout) == 36
    assert total_steps(CONFIG, [MixtureEntry(PROMPTS)], None) == 12


def uniform_but(monkeypatch, ids):
    """Samples to other prompts than these are all worth the same."""

    def values(self, question, texts, tokens=()):
        return [Value(i if question.id in ids else 1.0) for i in range(len(texts))]

    monkeypatch.setattr(RewardSection, "values", values)


def test_prompts_whose_samples_are_worth_the_same_make_room(
    rollouts, tiny_model, records, monkeypatch
):
    teaching = {record.id for record in records[:3]}
    uniform_but(monkeypatch, teaching)
    config = CONFIG.model_copy(update={"batch_size": 3, "micro_batch_size": 3})
    state = State(tiny_model[1])
    filled = rollouts(config, dynamic_sampling=2)
    host = filled.draw(state)
    assert set(host.ids) == teaching  # of six prompts, in two draws
    assert 0 < host.metrics["frac_reward_zero_std"] < 1
    left_out = rollouts(config, dynamic_sampling=1).draw(state)
    whole = rollouts(config).draw(state)
    assert set(left_out.ids) == set(whole.ids) & teaching != set(whole.ids)
    weights = left_out.arrays.prompts.weights
    assert weights.sum() == len(left_out.ids) and weights.size == 3
    # The samples of a prompt are those of a run that leaves none out.
    same, ids = left_out.ids[0], []
    for host in (left_out, whole):
        place = host.ids.index(same)
        prompts = jax.tree.map(lambda x, place=place: x[0, place], host.arrays.prompts)
        ids.append([row[mask].tolist() for row, mask in _pairs(prompts)])
    assert ids[0] == ids[1]
    # Draws beyond the epochs' prompts find some.
    for _ in range(total_steps(config, [MixtureEntry(PROMPTS)], filled.rollout) - 1):
        assert filled.draw(state).ids


def _pairs(prompts):
    return zip(prompts.response_ids, prompts.response_mask, strict=True)


def test_where_nothing_teaches_a_batch_is_not_empty(rollouts, tiny_model, monkeypatch):
    uniform_but(monkeypatch, ())
    host = rollouts(dynamic_sampling=2, minibatches=2).draw(State(tiny_model[1]))
    assert len(host.ids) == 1 and not host.arrays.fields["advantages"].any()


def test_truncated_samples_are_marked(rollouts, tiny_model):
    host = rollouts(mask_truncated=True).draw(State(tiny_model[1]))
    arrays = flat(host.arrays)
    ends = arrays.prompts.response_ids == 2  # EOS
    ended = (ends & arrays.prompts.loss_mask).any(axis=-1)
    np.testing.assert_array_equal(arrays.fields["truncated"], ~ended)
    assert host.metrics["completions/clipped_ratio"] == pytest.approx((~ended).mean())


def test_a_rollout_of_which_all_samples_are_cut_is_told(rollouts, tiny_model, caplog):
    rollouts(max_new_tokens=1).draw(State(tiny_model[1]))
    assert not caplog.messages
    rollouts(max_new_tokens=1, mask_truncated=True).draw(State(tiny_model[1]))
    (message,) = caplog.messages
    assert "100 % of 8 samples were cut at rollout.max_new_tokens 1" in message


def test_leaving_the_reference_costs(rollouts, tiny_model):
    """The sum over a sample's tokens of log pi_old - log ref, times `reward_kl`."""
    model, params = tiny_model
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    config = Training(**CONFIG.model_dump(exclude={"reference"}), reference={"type": "online"})
    options = {"baseline": "leave_one_out", "scale": "none", "temperature": 0.7}
    state = State(params, moved=moved)
    plain = flat(rollouts(config, **options).draw(state).arrays)
    found = flat(rollouts(config, reward_kl=0.3, **options).draw(state).arrays)
    old, reference = (
        np.asarray(response_log_probs(model, tree, plain.prompts, temperature=0.7))
        * plain.prompts.loss_mask
        for tree in (params, moved)
    )
    penalty = 0.3 * (old - reference).sum(axis=-1)
    others = (penalty.sum(axis=1, keepdims=True) - penalty) / 3
    wanted = plain.fields["advantages"] - (penalty - others)
    np.testing.assert_allclose(found.fields["advantages"], wanted, rtol=1e-4, atol=1e-4)
    assert "old_log_probs" not in found.fields and np.abs(penalty - others).max() > 0.01


PAPO = CONFIG.model_copy(
    update={
        "objective": Training(
            objective=[{"type": "grpo"}, {"type": "papo", "mask_share": 0.5}]
        ).objective
    }
)


def test_masked_images_are_a_context_of_their_own(rollouts, tiny_model):
    """The same samples after images of which half of the patches are masked, anew in a rollout."""
    states = [State(tiny_model[1], step) for step in (0, 7)]
    first, second = (flat(rollouts(PAPO).draw(state).arrays) for state in states)
    for arrays in (first, second):
        clean, masked = (jax.tree.map(lambda x, i=i: x[i::2], arrays.prompts) for i in (0, 1))
        np.testing.assert_array_equal(clean.response_ids, masked.response_ids)
        np.testing.assert_array_equal(clean.prompt_ids, masked.prompt_ids)
        hidden = (masked.pixel_values == 0) & (clean.pixel_values != 0)
        assert hidden.mean() == pytest.approx(0.5, abs=0.02)
        shown = masked.pixel_values != 0
        np.testing.assert_array_equal(masked.pixel_values[shown], clean.pixel_values[shown])
    first_pixels, second_pixels = (x.prompts.pixel_values for x in (first, second))
    np.testing.assert_array_equal(first_pixels[0::2], second_pixels[0::2])
    assert (first_pixels[1::2] != second_pixels[1::2]).any()


@pytest.fixture
def run(tiny_model, tiny_processor, records, mesh):
    def run(folder, config, rollout, mesh=mesh):
        names = ("main", "other_image") if len(config.objective) > 1 else ("main",)
        examples = Examples(known(records), names)
        return trained(folder, tiny_model, tiny_processor, examples, config, rollout, LENGTHS, mesh)

    return run


MINIBATCHES = Rollout(**OPTIONS, minibatches=2, num_iterations=2, dynamic_sampling=2)


@pytest.mark.parametrize("before_step", [6, 7, 9])
@pytest.mark.slow
def test_a_killed_run_with_minibatches_ends_as_an_undisturbed_one(before_step, run, tmp_path):
    """Killed before the second minibatch of a rollout, its second pass, and the next rollout."""
    config = CONFIG.model_copy(update={"max_steps": 12})
    undisturbed = run(tmp_path / "whole", config, MINIBATCHES)
    with interrupted(before_step), pytest.raises(Killed):
        run(tmp_path / "killed", config, MINIBATCHES)
    params = run(tmp_path / "killed", config, MINIBATCHES)
    for path, value in undisturbed.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)
    rows = [reproducible_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert rows[0] == rows[1] and len(rows[0]) == 12


OBJECTIVES = {
    "cispo, uncertain tokens": {"type": "cispo", "top_entropy_quantile": 0.4},
    "sapo": {"type": "sapo"},
    "two-sided, tokens of sequences": {"type": "grpo", "ratio": "sequence_token", "delta": 1.5},
    "papo": [{"type": "grpo"}, {"type": "papo"}],
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.slow
def test_devices_and_micro_batches_change_nothing(name, run, tmp_path):
    """Eight devices, each with a row at a time, against one with all."""
    objective = Training(objective=OBJECTIVES[name]).objective
    # A large epsilon, or the first steps follow the signs of gradients that are next to nothing.
    smooth = AdamW(learning_rate=1e-2, weight_decay=0.0, epsilon=1.0)
    update = {"objective": objective, "batch_size": 4, "micro_batch_size": 4, "max_steps": 2}
    update["optimizer"] = smooth
    config = CONFIG.model_copy(update=update)
    rollout = Rollout(**OPTIONS, num_iterations=2, mask_truncated=False)
    run(tmp_path / "one", config, rollout)
    cut = config.model_copy(update={"micro_batch_size": 2})
    run(tmp_path / "eight", cut, rollout, meshes.mesh_of(1, 2, 4))
    one, eight = (read_metrics(tmp_path / part / "metrics.jsonl") for part in ("one", "eight"))
    for ours, theirs in zip(one, eight, strict=True):
        for key in ("reward", "completions/mean_length", "loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
