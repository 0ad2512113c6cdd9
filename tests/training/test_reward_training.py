"""Reward models trained by `mmpo train`: learned, gone on with, with adapters, on eight devices."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import meshes
from helpers.reward_heads import headed, write_jsonl

import mmpo_jax
from mmpo_jax import cli
from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import training_batches
from mmpo_jax.models.config import RewardHead
from mmpo_jax.models.lora import Lora, add_adapters
from mmpo_jax.models.reward_head import is_reward_head
from mmpo_jax.objectives.terms import make_term, needs
from mmpo_jax.parallel.mesh import batch_shards, put_batch
from mmpo_jax.picture_world.critiques import PROMPT
from mmpo_jax.picture_world.language import hallucinated_caption, true_caption
from mmpo_jax.picture_world.preferences import preferences, write_preferences
from mmpo_jax.picture_world.records import prompt_records, scenes
from mmpo_jax.recipes.files import load_recipe
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.training.examples import make_examples, tokenizer_for
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.metrics import FILE, read_metrics
from mmpo_jax.training.plan import TrainingError
from mmpo_jax.training.step import create_state, make_step, trainable_paths

RECIPE = Path(mmpo_jax.__file__).parent.parent / "configs/picture_world_reward.yaml"
CHAIN = RECIPE.with_name("picture_world_mm_dpo.yaml")
CRITIC = [make_term("bradley_terry", margin=0.1), make_term("critique", prompt=PROMPT)]
SCALAR = [make_term("bradley_terry")]
LENGTHS = Lengths(prompt=(24,), response=(128,))


def captioned(count, split="align"):
    """Prompts about scenes with captions that the language makes, and the scenes."""
    rng = np.random.default_rng(0)
    for record, scene in zip(
        prompt_records(split, 0, count, image_size=24), scenes(split, 0, count), strict=True
    ):
        captions = [hallucinated_caption(scene, rng), true_caption(scene, rng)]
        yield record, [*captions, hallucinated_caption(scene, rng)], scene


def overrides(tmp_path, model, *more, scenes=24):
    files = write_preferences(str(tmp_path / "preferences"), captioned(scenes))
    return [
        f"data.path={files['rankings']}",
        f"model={model}",
        f"output={tmp_path / 'out'}",
        "training.batch_size=8",
        "training.max_steps=2",
        "training.log_every=1",
        "training.save_every=1",
        "training.schedule.warmup_ratio=0",
        "validation=null",
        *more,
    ]


def one_device(**sizes):
    return meshes.one_device()


@pytest.fixture
def train(tmp_path, tiny_folder, monkeypatch):
    """Runs the recipe; (folder, its model, its parameters by path)."""
    monkeypatch.setattr("mmpo_jax.commands.train.make_mesh", one_device)

    def train(*more):
        recipe = load_recipe(TrainRecipe, RECIPE, overrides(tmp_path, tiny_folder, *more))
        folder = run_training(recipe)
        model, params = load_model(folder)
        return folder, model, flatten(params)

    return train


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(train, tmp_path, tiny_model):
    _, model, params = train()
    assert model.config.reward_head == RewardHead("linear", PROMPT)
    rows = read_metrics(str(tmp_path / "out" / FILE))
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss/bradley_terry"] + row["loss/critique"])
        assert row["nll_loss"] > 0 and 0 <= row["rewards/accuracies"] <= 1
        gap = row["rewards/chosen"] - row["rewards/rejected"]
        assert gap == pytest.approx(row["rewards/margins"], abs=1e-5)
    start = flatten(tiny_model[1])
    assert not np.array_equal(
        start["language_model/norm/scale"], params["language_model/norm/scale"]
    )
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "2")
    _, _, again = train()
    for path, leaf in params.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    # The run itself is a reward model, and so is what is converted from it.
    run = load_start(str(tmp_path / "out"))
    assert run.model.config.reward_head == model.config.reward_head
    target = str(tmp_path / "converted")
    assert cli.main(["convert", str(tmp_path / "out"), target]) == 0
    converted, read = load_model(target)
    assert converted.config == model.config
    for path, leaf in flatten(read).items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


@pytest.mark.slow
def test_the_chain_of_mm_dpo(train, tmp_path, tiny_folder, monkeypatch):
    """A reward model, what it says of the data, and a policy trained with its margins."""
    monkeypatch.setattr("mmpo_jax.commands.reward.make_mesh", one_device)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    critic, _, _ = train("training.max_steps=1")
    data, rewards = tmp_path / "preferences" / "rankings.jsonl", tmp_path / "rewards.jsonl"
    flags = ["--data", str(data), "--output", str(rewards), "--max-new-tokens", "8"]
    assert cli.main(["reward", "--model", critic, *flags]) == 0
    found = [json.loads(line) for line in rewards.read_text().splitlines()]
    gaps = [max(row["rewards"]) - min(row["rewards"]) for row in found]
    assert len(found) == len(data.read_text().splitlines()) and max(gaps) > 0

    def last(name, *more):
        made = [f"data.path={data}", f"model={tiny_folder}", f"output={tmp_path / name}"]
        made += ["training.batch_size=8", "training.max_steps=2", "validation=null", *more]
        run_training(load_recipe(TrainRecipe, CHAIN, made))
        return read_metrics(str(tmp_path / name / FILE))[-1]

    given = last("given", f"data.rewards={rewards}")
    assert given["loss"] == pytest.approx(given["loss/mm_dpo"] + 0.25 * given["loss/sft"])
    flat = "training.objective=[{type: mm_dpo, w: 0}, {type: sft, weight: 0.25}]"
    plain = last("plain", f"data.rewards={rewards}", flat)
    assert given["loss/mm_dpo"] != pytest.approx(plain["loss/mm_dpo"], rel=1e-5)


@pytest.mark.slow
def test_a_scalar_baseline_with_two_layers(train, tmp_path):
    objective = json.dumps([{"type": "bradley_terry"}])
    _, model, params = train("reward_head=two_layer", f"training.objective={objective}")
    assert model.config.reward_head == RewardHead("two_layer")
    assert {path for path in params if is_reward_head(path)} == {
        f"rm_head/{layer}/{leaf}" for layer in ("dense", "out_proj") for leaf in ("kernel", "bias")
    }
    (row, _) = read_metrics(str(tmp_path / "out" / FILE))
    assert "nll_loss" not in row


@pytest.mark.slow
def test_adapters_beside_a_new_head(train, tmp_path, tiny_model):
    _, _, params = train(
        'training.lora={"target": "language_model/layers/self_attn/.*", "rank": 2}',
        "training.freeze=[]",
        "training.optimizer.learning_rate=0.01",
    )
    start = flatten(tiny_model[1])
    changed = {p for p in start if not np.array_equal(start[p], params[p])}
    assert changed == {f"language_model/layers/self_attn/{n}_proj/kernel" for n in "qkvo"}
    adapter = load_start(str(tmp_path / "out" / "adapter"))
    for path, leaf in flatten(adapter.params).items():
        np.testing.assert_allclose(leaf, params[path], rtol=0, atol=1e-6, err_msg=path)


def test_heads_train_where_adapters_do(tiny_model):
    model, params = headed(*tiny_model)
    paths = list(flatten(add_adapters(params, model, Lora(rank=1), (), 0)))
    kept = trainable_paths(paths, ())
    assert "score/kernel" in kept
    assert all(path.endswith(("lora_a", "lora_b")) for path in kept if path != "score/kernel")


def test_refusals(train, tmp_path):
    with pytest.raises(TrainingError, match="bradley_terry needs a model with a reward head, and"):
        train("reward_head=null")
    folder = tmp_path / "preferences" / "rankings.jsonl"
    rows = [json.loads(line) for line in folder.read_text().splitlines()]
    assert all(r["critique"].endswith(("thing .", "things .")) for r in rows[0]["responses"])
    for row in rows:
        for response in row["responses"]:
            del response["critique"]
    other = write_jsonl(folder.parent / "others.jsonl", rows)
    with pytest.raises(DataError, match=r"no row has the field 'critique'.*leave `critique` out"):
        train(f"data.path={other}")


def step_of(model, params, processor, terms, mesh, micro, packed):
    """(metrics, parameters) after a step in float64 on a mesh."""
    tokenize = tokenizer_for(terms, 0)
    records = [
        preferences(*asked)["rankings"] for asked in captioned(12) if len(preferences(*asked))
    ][:8]
    records[1::2] = [without_critiques(record) for record in records[1::2]]
    tokenized = [tokenize(record, processor, 64, 128) for record in records]
    batches = training_batches(
        make_examples(tokenized, needs(terms)),
        processor,
        LENGTHS,
        seed=0,
        epochs=1,
        batch_size=8,
        micro_batch_size=micro,
        packed_over=batch_shards(mesh) if packed else None,
    )
    optimizer = optax.sgd(0.1)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    with jax.set_mesh(mesh):
        loss = make_loss(model, terms)
        state = create_state(wide, model, optimizer, (), mesh)
        step = make_step(loss, optimizer, lambda step: 0.1, state, jnp.float64)
        state, metrics = step(state, put_batch(next(batches).arrays, mesh, leading=1))
    found = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
    return found, {path: np.asarray(leaf) for path, leaf in state.params.items()}


def without_critiques(record):
    kept = tuple(dataclasses.replace(r, critique=None) for r in record.responses)
    return dataclasses.replace(record, responses=kept)


@pytest.mark.parametrize(
    ("terms", "kind", "sizes", "micro", "packed"),
    [
        (CRITIC, "two_layer", (1, 1, 1), 2, True),
        (CRITIC, "two_layer", (2, 2, 2), 8, True),
        (SCALAR, "linear", (1, 8, 1), 8, False),
    ],
    ids=["cut", "critic on eight", "scalar on eight"],
)
@pytest.mark.slow
def test_a_step_does_not_depend_on_devices_or_cuts(
    tiny_model, tiny_processor, terms, kind, sizes, micro, packed
):
    """Rows with critiques and without, of two and of three responses, with ties."""
    with jax.enable_x64(True):
        arguments = *headed(*tiny_model, kind, PROMPT), tiny_processor, terms
        whole, wanted = step_of(*arguments, meshes.mesh_of(1, 1, 1), 8, packed=False)
        found, params = step_of(*arguments, meshes.mesh_of(*sizes), micro, packed)
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-6)
    for path, leaf in params.items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_the_picture_worlds_recipe_learns(tmp_path, monkeypatch):
    """A minute of training on critiques by rule: the reward model that reads its own critiques is
    right more often than not about captions of scenes that it has not seen."""
    monkeypatch.setattr("mmpo_jax.commands.train.make_mesh", one_device)
    monkeypatch.setattr("mmpo_jax.commands.reward.make_mesh", one_device)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    more = ["training.max_steps=60", "training.batch_size=16", "training.log_every=10"]
    more += ["training.save_every=60", "training.schedule.warmup_ratio=0.05"]
    made = overrides(tmp_path, "builtin:picture_world", *more, scenes=320)
    folder = run_training(load_recipe(TrainRecipe, RECIPE, made))
    held = write_preferences(str(tmp_path / "held"), captioned(64, "test"))["pairs"]
    out = tmp_path / "rewards.jsonl"
    given = ["--model", folder, "--data", held, "--output", str(out), "--max-new-tokens", "72"]
    assert cli.main(["reward", *given]) == 0
    rewards = np.array([json.loads(line)["rewards"] for line in out.read_text().splitlines()])
    accuracy = np.mean(rewards[:, 0] > rewards[:, 1])
    assert len(rewards) > 50 and accuracy > 0.7
