"""Training adapters on a quantised base: checkpoints, resume, results, what is refused."""

import dataclasses
import functools
import json
import logging
import math

import jax
import numpy as np
import pytest
from helpers.loop_runs import Killed, interrupted, make_start, same
from helpers.run_files import reproducible_rows

from mmpo_jax.checkpoints.cards import make_card, read_card
from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.huggingface import load_params, save_model
from mmpo_jax.checkpoints.peft import read_adapter_config
from mmpo_jax.checkpoints.steps import checkpoint_shapes
from mmpo_jax.commands.convert import convert
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError, RewardHead
from mmpo_jax.models.lora import SCALE, is_adapter, merge_adapters
from mmpo_jax.models.model import Model
from mmpo_jax.models.quantized_base import quantized_paths
from mmpo_jax.models.reward_head import with_reward_head
from mmpo_jax.picture_world.language import hallucinated_caption, true_caption
from mmpo_jax.picture_world.preferences import write_preferences
from mmpo_jax.picture_world.records import prompt_records, scenes
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.batches import TrainingData
from mmpo_jax.training.loop import Run, train
from mmpo_jax.training.plan import TrainingError, check_training
from mmpo_jax.training.saving import load_before

PAIRS = 128
NEW_HEAD = functools.partial(with_reward_head, kind="linear", critique_prompt=None)
"""A change of a config."""
LORA = {"target": "language_model/layers/.*/[qv]_proj", "rank": 2, "dora": True}


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """(folder of the output, options of training) -> the recipe."""
    rows = [
        {"id": str(i), "images": [], "prompt": "a ring ?", "chosen": "yes", "rejected": "no"}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(output, kind="int4", model=tiny_folder, **training):
        return TrainRecipe.model_validate(
            {
                "output": str(tmp_path / output),
                "model": str(model),
                "lengths": {"prompt": [24], "response": [8]},
                "data": {"source": "file", "path": str(tmp_path / "rows.jsonl")},
                "training": {
                    "batch_size": 8,
                    "epochs": 4,
                    "log_every": 1,
                    "save_every": 2,
                    "optimizer": {"learning_rate": 3e-2},
                    "schedule": {"warmup_ratio": 0},
                    "lora": LORA | {"quantize_base": kind},
                    **training,
                },
            }
        )

    return recipe


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.slow
def test_a_run_ends_with_what_was_trained(recipe, tiny_folder, tiny_model, tmp_path, kind):
    """Checkpoints have the adapters, and the model is the quantised base with them merged."""
    model = tiny_model[0]
    run_training(recipe("run", kind))
    run = tmp_path / "run"
    rows = reproducible_rows(run / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < math.log(2) - 0.05

    saved = checkpoint_shapes(str(run / "checkpoints" / "4"))
    assert len(saved) == 2 * 4
    assert all(is_adapter(path) or path.endswith(SCALE) for path in saved)
    below = json.loads((run / "base" / "below.json").read_text())
    assert (below["model"], below["quantization"]) == (str(tiny_folder), kind)
    assert read_adapter_config(run / "adapter")["base_model_name_or_path"] == str(tiny_folder)

    other = {"int8": "int4", "int4": "int8"}[kind]
    with pytest.raises(ModelError, match=rf"trained above a base of {kind}; .* or make it {kind}"):
        load_start(str(run), quantization=other)

    merged = rf"trained above a base of {kind}; .*quantize_base out$"
    with pytest.raises(ModelError, match=merged):
        load_start(str(run / "model"), quantization=kind)
    with pytest.raises(ModelError, match=merged):  # whose adapters are merged below it
        load_start(str(run), quantization=kind, change=NEW_HEAD)
    assert f"Trained above a base of {kind}" in (run / "model" / "README.md").read_text()

    written = flatten(load_params(run / "model", model))
    convert(str(run), str(tmp_path / "converted"))
    converted = flatten(load_params(tmp_path / "converted", model))
    base = flatten(load_start(str(tiny_folder)).params)
    quantized = flatten(
        merge_adapters(load_start(str(tiny_folder), quantization=kind).params)  # has none to merge
    )
    moved = []
    for path, leaf in flatten(load_start(str(run)).params).items():
        np.testing.assert_allclose(written[path], leaf, rtol=0, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(converted[path], leaf, rtol=0, atol=1e-6, err_msg=path)
        if not np.allclose(quantized[path], leaf, rtol=0, atol=1e-6):
            moved.append(path)
        assert (path in quantized_paths(model)) == (not np.array_equal(leaf, base[path])), path
    assert sorted(path.split("/")[-2] for path in moved) == ["q_proj", "v_proj"]


@pytest.mark.slow
def test_what_a_narrow_result_keeps_of_the_update(
    recipe, tiny_folder, tiny_model, tmp_path, caplog
):
    """By NumPy, from the dequantised base: rounding it to int8 is no part of the update."""
    caplog.set_level(logging.INFO)
    run_training(recipe("run", "int8", epochs=2, optimizer={"learning_rate": 1e-5}))
    run, target = tmp_path / "run", tmp_path / "narrow"
    convert(str(run), str(target), "bfloat16")
    base = load_start(str(tiny_folder), quantization="int8").params
    trees = merge_adapters(base), load_start(str(run)).params, load_params(target, tiny_model[0])
    flat = [flatten(tree) for tree in trees]
    product = square = 0.0
    for path in flat[0]:
        before, trained, kept = (np.float64(tree[path]) for tree in flat)
        product += np.sum((trained - before) * (kept - before))
        square += np.sum((trained - before) ** 2)
    assert abs(product / square - 1) > 0.01  # else any base would do
    told = f"{product / square:.1%} of the update is in the saved weights."
    assert told in (target / "README.md").read_text()
    assert sum(told in message for message in caplog.messages) == 1
    with pytest.raises(ModelError, match="trained above a base of int8"):
        load_start(str(target), quantization="int4")


def test_folders_say_above_what_they_were_trained(tiny_model, tiny_folder, tmp_path):
    """And so do those that are made of them, whatever trains there."""
    model, params = tiny_model
    save_model(tmp_path / "model", model, params, tiny_folder, quantized_base="int8")
    start = load_start(str(tmp_path / "model"))
    assert start.quantized_base == "int8"
    assert load_start(str(tiny_folder)).quantized_base is None
    save_model(tmp_path / "copy", model, params, start.processor.folder)
    for name in ("model", "copy"):
        for change in (None, NEW_HEAD):
            with pytest.raises(ModelError, match=rf"{name}: was trained above a base of int8; to "):
                load_start(str(tmp_path / name), quantization="int8", change=change)
    assert load_start(str(tiny_folder), quantization="int8", change=NEW_HEAD).quantized_base


@pytest.mark.parametrize("kind", ["int8", None])
def test_an_update_is_counted_from_the_base_that_was_trained_above(recipe, tiny_folder, mesh, kind):
    """Rounding of the base is no part of the update, a share of which cards tell."""
    start = load_start(str(tiny_folder), mesh=mesh, quantization=kind)
    given = {"from_hub": False, "base_fingerprint": start.fingerprint}
    card = make_card(recipe("run", kind), start.model, {}, **given)
    before = load_before(card, start.model, mesh)
    assert before.unknown == ""
    same(*(jax.tree.map(np.asarray, flatten(tree)) for tree in (before.params, start.params)))


@pytest.mark.slow
def test_dpo_of_the_picture_world_stays_near(tmp_path):
    """The shipped checkpoint learns true captions from hallucinated ones: losses and margins of
    held-out pairs beside those of the base as it is (docs/training.md has them)."""
    rng = np.random.default_rng(0)
    records = prompt_records("align", 0, PAIRS, image_size=24)
    asked = [
        (record, [true_caption(scene, rng), hallucinated_caption(scene, rng)], scene)
        for record, scene in zip(records, scenes("align", 0, PAIRS), strict=True)
    ]
    path = write_preferences(str(tmp_path / "pairs"), asked)["pairs"]

    def measured(kind):
        training = {
            "batch_size": 16,
            "epochs": 2,
            "log_every": 1,
            "save_every": 8,
            "optimizer": {"learning_rate": 3e-3},
            "lora": {"rank": 8, "quantize_base": kind},
        }
        recipe = TrainRecipe.model_validate(
            {
                "output": str(tmp_path / f"run-{kind}"),
                "model": "builtin:picture_world",
                "lengths": {"prompt": [24], "response": [32]},
                "data": {"source": "file", "path": path},
                "validation": {"share": 0.25},
                "training": training,
            }
        )
        run_training(recipe)
        row = reproducible_rows(tmp_path / f"run-{kind}" / "metrics.jsonl")[-1]
        return [row[name] for name in ("eval_loss", "eval_rewards/margins")]

    (loss, margin), *quantized = (measured(kind) for kind in (None, "int8", "int4"))
    print("loss and margin of held-out pairs:", loss, margin, *quantized)
    assert loss < 0.9 * math.log(2)
    for (other_loss, other_margin), tolerance in zip(quantized, (0.05, 0.25), strict=True):
        assert other_loss == pytest.approx(loss, rel=tolerance)
        assert other_margin == pytest.approx(margin, rel=tolerance)


@pytest.mark.slow
def test_resume_is_exact(recipe, tmp_path):
    run_training(recipe("whole"))
    with pytest.raises(Killed), interrupted(4):
        run_training(recipe("again"))
    run_training(recipe("again"))
    ours, theirs = (flatten(load_start(str(tmp_path / n)).params) for n in ("again", "whole"))
    same(ours, theirs)
    rows = [reproducible_rows(tmp_path / n / "metrics.jsonl") for n in ("again", "whole")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_run_is_gone_on_with(recipe, tiny_folder, tmp_path):
    """A run above the same base goes on with the adapters of another: the reference is what these
    made of it, and the update is counted from there."""
    run_training(recipe("first", "int8", epochs=2))
    second = recipe("second", "int8", model=tmp_path / "first", epochs=1)
    run_training(second)
    (row,) = reproducible_rows(tmp_path / "second" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    first, ours = (
        load_start(str(tmp_path / name), quantization="int8") for name in ("first", "second")
    )
    below = json.loads((tmp_path / "second" / "base" / "below.json").read_text())
    assert below["model"] == str(tiny_folder)
    moved = [
        path
        for path, leaf in flatten(ours.params).items()
        if not np.array_equal(leaf, flatten(first.params)[path])
    ]
    assert moved and all(map(is_adapter, moved))
    card = read_card(tmp_path / "second" / "base", {})
    before = load_before(card, ours.model, None)
    same(*(jax.tree.map(np.asarray, flatten(tree)) for tree in (before.params, first.params)))

    lora = LORA | {"quantize_base": "int8", "rank": 3}
    with pytest.raises(ModelError, match=r"lora.rank is 3, and the adapters of the run .* have 2"):
        run_training(recipe("third", "int8", model=tmp_path / "first", lora=lora))


@pytest.mark.slow
def test_another_base_is_refused(recipe, tiny_model, tiny_folder, tmp_path):
    model, params = tiny_model
    save_model(tmp_path / "model", model, params, tiny_folder)
    run_training(recipe("run", model=tmp_path / "model", epochs=1))
    flat = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    flat["language_model/norm/scale"] += 1
    save_model(tmp_path / "model", model, unflatten(flat), tiny_folder)
    with pytest.raises(ModelError, match=r"has adapters alone, and \S+, which they were"):
        load_start(str(tmp_path / "run"))


def test_what_is_refused(recipe, tiny_model, tiny_processor, mesh):
    random = recipe("random").model_copy(update={"weights": "random"})
    with pytest.raises(MmpoError, match=r"quantize_base: with `weights: random` no file has"):
        run_training(random)
    start = make_start(tiny_model, tiny_processor)
    training = random.training
    with pytest.raises(TrainingError, match=r"quantize_base is int4, and the start was loaded wi"):
        train(start, TrainingData([]), training, random.lengths, mesh, Run("", {}, 0))
    config = dataclasses.replace(start.model.config, reward_head=RewardHead("linear"))
    rewarding = Training.model_validate(
        {"objective": {"type": "bradley_terry"}, "lora": training.lora, "batch_size": 8}
    )
    with pytest.raises(TrainingError, match="a reward model's base is not quantised"):
        check_training(rewarding, Model.create(config), mesh)
