"""Training adapters: nothing else moves, resume is exact, eight devices do what one does."""

import dataclasses
import json
import math

import huggingface_hub
import jax
import numpy as np
import optax
import pytest
from helpers.loop_runs import compiled_once, make_record, make_start, same, with_reference
from helpers.run_files import contents, reproducible_rows

from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.checkpoints.peft import load_adapter, read_adapter_config
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import Response, Turn
from mmpo_jax.models.lora import (
    MAGNITUDE,
    SCALE,
    A,
    B,
    Lora,
    add_adapters,
    is_adapter,
    merge_adapters,
)
from mmpo_jax.parallel.mesh import make_mesh, put_params
from mmpo_jax.recipes.optimizers import AdamW, Cosine
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.training import loop
from mmpo_jax.training.batches import TrainingData
from mmpo_jax.training.loop import Run, train
from mmpo_jax.training.optimizer import make_optimizer
from mmpo_jax.training.plan import TrainingError, check_training
from mmpo_jax.training.saving import save_adapters
from mmpo_jax.training.step import create_state

LENGTHS = Lengths(prompt=(24,), response=(8,))
ROWS, STEPS = 16, 4
TARGET = "language_model/layers/self_attn/[qv]_proj|multi_modal_projector/linear_1"
LAYERS = 3
CONFIG = Training(
    objective={"type": "dpo"},
    lora=Lora(target=TARGET, rank=4, alpha=8, dropout=0.2),
    # Adam divides by the gradient's size: a small epsilon would blow up the rounding of zeros.
    optimizer=AdamW(learning_rate=3e-2, epsilon=1e-3),
    schedule=Cosine(warmup_ratio=0),
    epochs=5,
    max_steps=STEPS,
    batch_size=8,
    log_every=1,
    save_every=2,
)
DORA = CONFIG.model_copy(update={"lora": CONFIG.lora.model_copy(update={"dora": True})})


@pytest.fixture(scope="module")
def examples(tiny_model, tiny_processor, mesh):
    """Pairs whose reference is the tiny model itself."""
    said = {
        "prompt": (Turn("user", "a ring ?"),),
        "responses": (Response.of("a red star"), Response.of("two rings")),
    }
    records = [dataclasses.replace(make_record(number), **said) for number in range(ROWS)]
    return with_reference(tiny_model, tiny_processor, records, LENGTHS, mesh, 8)


@pytest.fixture(scope="module")
def run(tiny_model, tiny_processor, examples, mesh):
    """Trains into a folder; returns (parameters by path, metrics). Equal steps compile once."""
    steps = {}

    def run(folder, config=CONFIG, mesh=mesh, seed=0):
        key = config.model_dump_json(exclude={"max_steps"}), mesh, seed
        with compiled_once(steps, key):
            params = train(
                make_start(tiny_model, tiny_processor),
                TrainingData(examples),
                config,
                LENGTHS,
                mesh,
                Run(str(folder), {}, seed),
            ).params
        arrays = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
        return arrays, reproducible_rows(folder / "metrics.jsonl")

    return run


@pytest.fixture(scope="module", params=[CONFIG, DORA], ids=["lora", "dora"])
def undisturbed(request, run, tmp_path_factory):
    """(the folder, parameters, metrics, the section of the recipe)"""
    folder = tmp_path_factory.mktemp("undisturbed") / "train"
    return folder, *run(folder, request.param), request.param


def test_only_adapters_change(undisturbed, tiny_model):
    _, params, metrics, config = undisturbed
    base = flatten(tiny_model[1])
    same({path: params[path] for path in base}, base)
    fresh = flatten(add_adapters(tiny_model[1], tiny_model[0], config.lora, (), 0))
    added = params.keys() - base.keys()
    assert added == fresh.keys() - base.keys()
    assert len(added) == (4 if config.lora.dora else 3) * LAYERS
    for path in added:
        if path.endswith(SCALE):
            assert np.all(params[path] == 2)
        else:
            assert np.abs(params[path] - fresh[path]).max() > 1e-2
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert metrics[-1]["loss"] < math.log(2) - 0.01


def test_resume_is_exact(run, undisturbed, tmp_path):
    """Dropout included: the run stops after two steps and goes on."""
    whole, params, metrics, config = undisturbed
    with pytest.MonkeyPatch.context() as patch:
        put_batch, taken = loop.put_batch, []

        def fragile(*args, **options):
            taken.append(None)
            if len(taken) == 4:
                raise KeyboardInterrupt
            return put_batch(*args, **options)

        patch.setattr(loop, "put_batch", fragile)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", config)
    again, rows = run(tmp_path / "run", config)
    same(again, params)
    assert rows == metrics
    assert contents(tmp_path / "run" / "metrics.jsonl") == contents(whole / "metrics.jsonl")


def test_an_orbax_run_is_loaded_merged(undisturbed, tiny_model):
    folder, params, *_ = undisturbed
    start = flatten(load_start(str(folder)).params)
    expected = flatten(merge_adapters(unflatten(params)))
    same({path: np.asarray(leaf) for path, leaf in start.items()}, expected)
    assert start.keys() == flatten(tiny_model[1]).keys()


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step(run, undisturbed, tmp_path):
    _, params, metrics, config = undisturbed
    without = config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.0})})
    plain, rows = run(tmp_path / "without", without)
    for first in (rows[0], metrics[0]):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    path = next(path for path in params if path.endswith(f"q_proj/{B}"))
    assert np.abs(plain[path] - params[path]).max() > 1e-3
    other, _ = run(tmp_path / "other", config, seed=1)
    assert np.abs(other[path] - params[path]).max() > 1e-3


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
@pytest.mark.slow
def test_eight_devices_do_what_one_does(run, undisturbed, tmp_path, sizes):
    """The same dropout masks included."""
    _, params, metrics, config = undisturbed
    ours, rows = run(tmp_path, config, mesh=make_mesh(*sizes))
    for path, leaf in params.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=2e-5, err_msg=path)
    for row, expected in zip(rows, metrics, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_the_state_has_no_moments_for_frozen_weights(tiny_model, mesh):
    """And no second copy of them, if they are on the devices already."""
    model, params = tiny_model
    placed = put_params(params, model.rules, mesh)
    adapted = loop.add_adapters(placed, model, CONFIG.lora, (), 0)
    optimizer = make_optimizer(CONFIG.optimizer, optax.constant_schedule(1.0))
    state = create_state(adapted, model, optimizer, (), mesh)
    assert len(state.params) == 2 * LAYERS
    assert all(is_adapter(path) for path in state.params)
    trained = sum(leaf.nbytes for leaf in state.params.values())
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer))
    assert 2 * trained <= moments <= 2 * trained + 64  # and a few counters
    for path, leaf in flatten(placed).items():
        ours, theirs = (x.addressable_shards[0].data for x in (state.frozen[path], leaf))
        assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer(), path


def test_what_runs_beside_the_policy_has_exact_magnitudes(tiny_model, mesh):
    """Of an online reference in bfloat16, whose outputs they multiply."""
    model, params = tiny_model
    adapted = add_adapters(params, model, DORA.lora, (), 0)
    optimizer = make_optimizer(DORA.optimizer, optax.constant_schedule(1.0))
    state = create_state(adapted, model, optimizer, (), mesh, reference_dtype="bfloat16")
    assert state.reference.keys() == state.params.keys()
    for path, leaf in state.reference.items():
        assert leaf.dtype == ("float32" if path.endswith(MAGNITUDE) else "bfloat16"), path


def test_what_is_frozen_gets_no_adapter(tiny_model, mesh):
    model, params = tiny_model
    lora = Lora(target=".*/q_proj")
    flat = flatten(loop.add_adapters(params, model, lora, ("vision_tower/.*",), 0))
    assert [path for path in flat if path.endswith(A)] == [
        f"language_model/layers/self_attn/q_proj/{A}"
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"lora": Lora(target="q_proj")},
            r"training\.lora\.target: 'q_proj' matches no dense layer",
        ),
        (
            {"lora": Lora(target="language_model/lm_head")},
            r"training\.lora\.target: 'language_model/lm_head' matches no dense layer",
        ),
        ({"freeze": ("language_model/.*", "multi.*")}, r"training\.lora\.target: all that"),
    ],
)
def test_impossible_targets_are_errors_for_people(tiny_model, mesh, changes, told):
    with pytest.raises(TrainingError, match=told):
        check_training(CONFIG.model_copy(update=changes), tiny_model[0], mesh)


@pytest.mark.slow
def test_a_recipe_ends_with_the_merged_model_and_the_adapter(tiny_folder, tmp_path):
    rows = [
        {"id": str(i), "images": [], "prompt": "a ring ?", "chosen": "yes", "rejected": "no"}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = TrainRecipe.model_validate(
        {
            "output": str(tmp_path / "out"),
            "model": str(tiny_folder),
            "lengths": {"prompt": [24], "response": [8]},
            "data": {"source": "file", "path": str(tmp_path / "rows.jsonl")},
            "training": {
                "batch_size": 8,
                "optimizer": {"learning_rate": 1e-2},
                "lora": {"target": ".*/[qv]_proj", "rank": 2, "dropout": 0.1},
            },
        }
    )
    assert run_training(recipe) == str(tmp_path / "out" / "model")
    model, merged = load_model(tmp_path / "out" / "model")
    adapter = tmp_path / "out" / "adapter"
    config = read_adapter_config(adapter)
    assert (config["base_model_name_or_path"], config["lora_dropout"]) == (str(tiny_folder), 0.1)
    leaves = load_adapter(adapter, model)
    assert any(np.abs(leaf).max() > 1e-3 for path, leaf in leaves.items() if path.endswith(B))
    again = flatten(load_start(str(adapter)).params)
    for path, leaf in flatten(merged).items():
        np.testing.assert_allclose(again[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    base = flatten(load_model(tiny_folder)[1])
    assert any(not np.array_equal(base[path], leaf) for path, leaf in flatten(merged).items())


@pytest.mark.parametrize("revision", [None, "v1"])
def test_what_a_result_says_it_was_made_from(
    tiny_folder, tiny_model, tmp_path, monkeypatch, revision
):
    """A hub id, and not where this machine keeps the download; of a folder its whole path."""
    asked = []

    def download(repository, revision, **_):
        asked.append((repository, revision))
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, params = tiny_model
    lora = Lora(rank=2)
    name = "org/name" if revision is None else f"org/name@{revision}"
    start = load_start(name)
    save_adapters(str(tmp_path / "out"), start, add_adapters(params, model, lora, (), 0), lora)
    config = read_adapter_config(tmp_path / "out" / "adapter")
    assert config["base_model_name_or_path"] == "org/name"
    assert config.get("revision") == revision
    again = load_start(str(tmp_path / "out" / "adapter"))
    assert set(asked) == {("org/name", revision)}  # the adapter names its base as it was named
    assert again.hub_id is None

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "model").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    start = load_start("runs/model")
    assert start.hub_id is None
    save_adapters("out", start, add_adapters(params, model, lora, (), 0), lora)
    config = read_adapter_config(tmp_path / "out" / "adapter")
    assert config["base_model_name_or_path"] == str(tmp_path / "runs" / "model")
