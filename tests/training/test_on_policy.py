"""On-policy training: what a rollout holds, exact resume, and that it learns what is rewarded."""

import json
import logging
import re
import signal
import statistics

import jax
import numpy as np
import pytest
from helpers import meshes
from helpers.loop_runs import Killed, interrupted
from helpers.rollouts import State, easy_rewards, tokenized_prompts, trained
from helpers.run_files import reproducible_rows
from pydantic import ValidationError

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.checkpoints.steps import CheckpointError
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.errors import DataError, Stopped
from mmpo_jax.data.examples import Example
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.data.skipped import SKIPPED_FILE
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.objectives.advantages import advantages
from mmpo_jax.picture_world.language import CAPTION_PROMPTS
from mmpo_jax.recipes.optimizers import AdamW
from mmpo_jax.recipes.rewards import RewardSection
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.rewards.registry import Question, Value
from mmpo_jax.training import loop
from mmpo_jax.training.metrics import means, read_metrics
from mmpo_jax.training.on_policy import Prompts, Rollouts, with_token_limit
from mmpo_jax.training.rollout_rewards import check_verdicts, reward_metrics, without_gaps
from mmpo_jax.training.row_use import PromptUse

LENGTHS = Lengths(prompt=(24,), response=(4, 8))
ROLLOUT = Rollout(
    rewards=[{"type": "picture_world_caption"}, {"type": "think_format", "weight": 0.5}],
    num_samples=4,
    max_new_tokens=6,
    num_iterations=2,
)
CONFIG = Training(
    objective={"type": "grpo", "beta": 0.1},
    reference={"type": "online"},
    optimizer=AdamW(learning_rate=1e-2, weight_decay=0.0),
    epochs=3,
    batch_size=4,
    micro_batch_size=2,
    log_every=1,
    save_every=2,
)
NAN = float("nan")
STEPS = 10  # 18 prompts in batches of 4, each used twice


@pytest.fixture(scope="module")
def records(tiny_processor):
    return tokenized_prompts(tiny_processor, LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def rewards():
    with easy_rewards():
        yield


@pytest.fixture(scope="module")
def run(tiny_model, tiny_processor, records, mesh):
    def run(folder, mesh=mesh, config=CONFIG, rollout=ROLLOUT):
        examples = [Example((record,), {}) for record in records]
        return trained(folder, tiny_model, tiny_processor, examples, config, rollout, LENGTHS, mesh)

    return run


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder), reproducible_rows(folder / "metrics.jsonl")


def test_metrics(undisturbed):
    _, rows = undisturbed
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {
        "loss",
        "kl",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/picture_world_caption/mean",
        "rewards/think_format/mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "clip_ratio/region_mean",
    } <= rows[0].keys()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["reward"] == rows[1]["reward"] != rows[2]["reward"]
    assert rows[0]["clip_ratio/region_mean"] == 0 < rows[1]["clip_ratio/region_mean"]
    assert rows[3]["kl"] > 0
    for row in rows:
        total = row["rewards/picture_world_caption/mean"] + 0.5 * row["rewards/think_format/mean"]
        assert row["reward"] == pytest.approx(total, abs=1e-6)
    assert rows[-1]["reward"] > rows[0]["reward"]


@pytest.mark.parametrize("before_step", [4, 7])
@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(before_step, run, undisturbed, tmp_path):
    """Killed before the second step with a rollout, and before the first one."""
    with interrupted(before_step), pytest.raises(Killed):
        run(tmp_path)
    params, metrics = run(tmp_path), reproducible_rows(tmp_path / "metrics.jsonl")
    for path, value in undisturbed[0].items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)
    assert metrics == undisturbed[1]


@pytest.mark.parametrize("after_step", [1, 9])
@pytest.mark.slow
def test_a_run_that_is_told_to_stop_ends_its_rollout(after_step, run, undisturbed, tmp_path):
    """Told in the midst of one; at the last of them there is nothing left to go on with."""
    put, taken = loop.put_batch, iter(range(1, 100))

    def told(*args, **options):
        if next(taken) == after_step:
            signal.raise_signal(signal.SIGTERM)
        return put(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "put_batch", told)
        with pytest.raises(Stopped, match=f"saved step {after_step + 1} of {STEPS}"):
            run(tmp_path)
    params, metrics = run(tmp_path), reproducible_rows(tmp_path / "metrics.jsonl")
    for path, value in undisturbed[0].items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)
    assert metrics == undisturbed[1]


@pytest.mark.slow
def test_a_position_within_a_rollout(tiny_model, tiny_processor, records, mesh):
    """Has the same prompts sampled again, for the updates that are left of it."""
    model, params = tiny_model

    def rollouts():
        prompts = Prompts(records, [MixtureEntry(len(records))], seed=3)
        checkpoint = Checkpoint(model, tiny_processor, params)
        return Rollouts(checkpoint, prompts, CONFIG, ROLLOUT, LENGTHS, mesh, micro_batch_size=2)

    first, second = rollouts(), rollouts()
    drawn = [first.draw(State(params)).ids]
    position = first.get_state()
    assert not first.can_resume()
    assert first.draw_again(position, State(params)) is None
    drawn += [first.draw(State(params)).ids for _ in range(2)]
    second.set_state(position)
    assert [second.draw(State(params)).ids for _ in range(2)] == drawn[1:]
    again = first.draw_again({"order": position["order"], "uses": 0}, State(params))
    assert again is not None and again.ids == drawn[0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.slow
def test_a_rollout(tiny_model, tiny_processor, records, mesh, temperature):
    """Samples with their rewards against each other, and log-probs under what sampled them."""
    model, params = tiny_model
    rollouts = Rollouts(
        Checkpoint(model, tiny_processor, params),
        Prompts(records, [MixtureEntry(len(records))], seed=3),
        CONFIG,
        ROLLOUT.model_copy(update={"temperature": temperature}),
        LENGTHS,
        mesh,
        micro_batch_size=2,
    )
    state = State(params)
    host = rollouts.draw(state)
    assert rollouts.draw(state) is host
    assert rollouts.draw(state) is not host
    assert host.ids == tuple(dict.fromkeys(host.ids))
    arrays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), host.arrays)
    log_probs = response_log_probs(model, params, arrays.prompts, temperature=temperature)
    log_probs *= arrays.prompts.loss_mask
    np.testing.assert_allclose(arrays.fields["old_log_probs"], log_probs, rtol=1e-5, atol=1e-5)
    rewards = np.zeros((4, 4, 2), np.float32)
    by_id = {record.id: record for record in records}
    for row, column in np.ndindex(4, 4):
        ids = arrays.prompts.response_ids[row, column][arrays.prompts.loss_mask[row, column]]
        assert tiny_processor.eos_id not in ids[:-1]
        text = tiny_processor.decode(ids.tolist())
        record = by_id[host.ids[row]]
        question = Question(record.id, record.question, record.images, record.solution)
        assert question.text in CAPTION_PROMPTS and len(question.images) == 1
        for place, section in enumerate(ROLLOUT.rewards):
            (value,) = section.values(question, [text])
            rewards[row, column, place] = value.score
    np.testing.assert_allclose(
        arrays.fields["advantages"], advantages(rewards, [1.0, 0.5]), atol=1e-5
    )
    total = (rewards @ [1.0, 0.5]).ravel().tolist()
    assert host.metrics["reward"] == pytest.approx(statistics.mean(total), abs=1e-6)
    assert host.metrics["reward_std"] == pytest.approx(statistics.stdev(total), abs=1e-6)


def test_a_prompt_twice_in_a_batch_is_sampled_anew(tiny_model, tiny_processor, records, mesh):
    """Batches of four from two prompts; each one's first samples are those of a batch without the
    second."""
    model, params = tiny_model

    def responses(parts, given):
        rollouts = Rollouts(
            Checkpoint(model, tiny_processor, params),
            Prompts(given, parts, seed=3),
            CONFIG,
            ROLLOUT,
            LENGTHS,
            mesh,
            micro_batch_size=2,
        )
        host = rollouts.draw(State(params))
        prompts = host.arrays.prompts
        ids = (prompts.response_ids * prompts.loss_mask).reshape(4, 4, -1)
        return [(id_, row.tolist()) for id_, row in zip(host.ids, ids, strict=True)]

    twice = responses([MixtureEntry(2)], records[:2])
    alone = dict(responses([MixtureEntry(4)], records[:4]))
    assert len({id_ for id_, _ in twice}) == 2
    samples = [tuple(sample) for _, row in twice for sample in row]
    assert len(set(samples)) == len(samples) == 16
    first = dict(reversed(twice))
    assert all(first[id_] == alone[id_] for id_ in first)


@pytest.mark.slow
def test_the_loss_has_the_temperature_of_the_samples(run, tmp_path):
    """So that what sampled them and what learns from them first are one distribution."""
    rollout = ROLLOUT.model_copy(update={"temperature": 0.2})
    run(tmp_path, config=CONFIG.model_copy(update={"max_steps": 1}), rollout=rollout)
    (first,) = read_metrics(tmp_path / "metrics.jsonl")
    assert first["clip_ratio/region_mean"] == 0


@pytest.mark.slow
def test_devices_change_nothing(run, undisturbed, tmp_path):
    """The samples of the first rollout, and what two steps make of them."""
    run(tmp_path, mesh=meshes.mesh_of(1, 2, 1), config=CONFIG.model_copy(update={"max_steps": 2}))
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    wanted = undisturbed[1][0]
    for name in ("reward", "completions/mean_length", "loss", "grad_norm"):
        assert first[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), name


def recipe(folder, output, **changes):
    values = {
        "output": str(output),
        "model": str(folder),
        "lengths": {"prompt": [24], "response": [8]},
        "data": {"source": "picture_world", "split": "align", "size": 8, "image_size": 24},
        "rollout": {
            "num_samples": 2,
            "max_new_tokens": 4,
            "rewards": [{"type": "picture_world_caption"}],
        },
        "training": {"objective": {"type": "grpo"}, "batch_size": 8},
    }
    return TrainRecipe.model_validate(values | changes)


@pytest.mark.slow
def test_a_recipe_trains(tiny_folder, tmp_path, caplog):
    """From prompts to a Hugging Face folder; other rewards make another run."""
    caplog.set_level(logging.INFO)
    made = recipe(tiny_folder, tmp_path)
    run_training(made)
    (line,) = (line for line in caplog.messages if line.startswith("rollouts "))
    assert 0 < float(line.split()[1]) < 100
    assert (tmp_path / "model" / "config.json").is_file()
    rewards = {"num_samples": 2, "max_new_tokens": 4, "rewards": [{"type": "think_format"}]}
    with pytest.raises(CheckpointError, match=r"recipe: rollout\.rewards"):
        run_training(recipe(tiny_folder, tmp_path, rollout=rewards))


@pytest.mark.slow
def test_a_run_that_missing_verdicts_stopped_goes_on_with_more_of_them_allowed(
    tiny_folder, tmp_path, monkeypatch
):
    """The limit is none of what a run is made of, nor of the keys of its rows."""
    options = {"objective": {"type": "grpo"}, "batch_size": 2, "max_steps": 3}
    options |= {"save_every": 1, "log_every": 1}
    calls = iter(range(100))

    def values(self, question, texts, tokens=()):
        fails = next(calls) >= 2  # behind the prompts of the first step
        return [Value(NAN if fails else len(text) % 3) for text in texts]

    def made(max_failed):
        rollout = {"num_samples": 2, "max_new_tokens": 4, "rewards": [{"type": "think_format"}]}
        rollout["max_failed"] = max_failed
        return recipe(tiny_folder, tmp_path, rollout=rollout, training=options)

    monkeypatch.setattr(RewardSection, "values", values)
    with pytest.raises(DataError, match=r"rollout of step 2: .* rollout\.max_failed allows 0\.5"):
        run_training(made(0.5))
    run_training(made(1.0))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1] == 3
    keys = [PromptUse.of(made(share).rollout).key() for share in (0.5, 1.0)]
    assert keys[0] == keys[1]


@pytest.mark.slow
def test_rows_without_an_answer_are_left_out(tiny_folder, tmp_path):
    rows = [{"prompt": "a ring ?", "answer": "yes"}, {"prompt": "a star ?"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout = {"num_samples": 2, "max_new_tokens": 4, "rewards": [{"type": "exact_match"}]}
    data = {"source": "file", "path": str(path), "max_skipped": 0.5}
    training = {"objective": {"type": "grpo"}, "batch_size": 8}
    made = recipe(tiny_folder, tmp_path / "out", rollout=rollout, data=data, training=training)
    run_training(made)
    (skipped,) = (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()
    assert json.loads(skipped)["reason"] == "no_answer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": None}, "rollout says how responses are sampled"),
        ({"training": {"objective": {"type": "sft"}}}, "rollout says how responses are sampled"),
        (
            {"training": {"objective": [{"type": "grpo"}, {"type": "sft"}]}},
            "some learn from samples",
        ),
        (
            {"training": {"objective": {"type": "grpo", "beta": 0.1}}},
            "grpo needs a reference that runs in the step",
        ),
        ({"lengths": {"prompt": [24], "response": [2]}}, "max_new_tokens 4 is more"),
        (
            {
                "rollout": {
                    "num_iterations": 3,
                    "max_new_tokens": 4,
                    "rewards": [{"type": "iou"}],
                }
            },
            "save_every must be a multiple of the steps of a rollout, .*, 3",
        ),
        ({"rollout": {"rewards": [], "max_new_tokens": 4}}, "grpo learns from rewards; give one"),
        ({"rollout": {"max_new_tokens": 4}}, "grpo learns from rewards; give one"),
        ({"rollout": {"rewards": [{"type": "iou"}], "top_p": 0.9}}, "top_p: .* whole distribution"),
        ({"rollout": {"rewards": [{"type": "iou"}], "top_k": 5}}, "top_k: .* whole distribution"),
        ({"rollout": {"rewards": [{"type": "iou"}, {"type": "iou"}]}}, "give each type once"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes, message, tmp_path):
    with pytest.raises(ValidationError, match=message):
        recipe("model", tmp_path, **changes)


def test_the_limit_of_dr_grpo_is_the_rollouts():
    config = Training(objective={"type": "grpo", "normalization": "dr_grpo"})
    assert with_token_limit(config, ROLLOUT).objective[0].max_tokens == 6


def test_samples_without_a_verdict_count_as_the_mean_of_the_others():
    rewards = np.array([[1, NAN], [NAN, NAN], [4, NAN]], np.float32)
    np.testing.assert_array_equal(without_gaps(rewards), [[1, 0], [2.5, 0], [4, 0]])


def test_metrics_count_missing_verdicts():
    """Means of a reward are over its verdicts, and left out where it gave none."""
    rewards = np.array([[[1, NAN], [NAN, NAN]], [[4, NAN], [7, NAN]]], np.float32)
    found = means([reward_metrics(rewards, {"iou": 1.0, "python": 2.0})])
    assert found["rewards/iou/mean"] == pytest.approx(4)
    assert found["rewards/iou/std"] == pytest.approx(3)
    assert found["rewards/iou/missing_ratio"] == 0.25
    assert found["rewards/python/missing_ratio"] == 1
    assert not {"rewards/python/mean", "rewards/python/std"} & found.keys()
    assert found["reward"] == pytest.approx((1 + 1 + 4 + 7) / 4)


def test_samples_that_no_reward_judges_are_told_and_counted(caplog):
    rollout = Rollout(rewards=[{"type": "iou"}, {"type": "think_format"}], max_failed=0.25)
    rewards = np.ones((2, 2, 2), np.float32)
    rewards[1, :, 1] = NAN
    check_verdicts(rewards, ["a", "b"], rollout, 6)
    assert not caplog.messages
    rewards[:, :, 1] = NAN
    check_verdicts(rewards, ["a", "b"], rollout, 6)
    assert caplog.messages == ["rollout of step 7: think_format gave none of 4 samples a verdict"]
    rewards[1, 0] = NAN
    check_verdicts(rewards, ["a", "b"], rollout, 6)
    told = "rollout of step 7: 1 of 4 samples have no verdict of any reward .* to prompt 'b'"
    assert re.match(told, caplog.messages[1])
    rewards[0, 0] = NAN
    with pytest.raises(DataError, match=r"2 of 4 samples .*, and rollout\.max_failed allows 0\.25"):
        check_verdicts(rewards, ["a", "b"], rollout, 6)


def test_a_reward_that_never_gives_a_verdict_stops_the_run(run, tmp_path, monkeypatch):
    def values(self, question, texts, tokens=()):
        return [Value(NAN) for _ in texts]

    monkeypatch.setattr(RewardSection, "values", values)
    with pytest.raises(DataError, match="rollout of step 1: 16 of 16 samples have no verdict"):
        run(tmp_path)
