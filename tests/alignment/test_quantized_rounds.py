"""Two rounds of adapters above a quantised base: the second goes on where the first ended."""

import json
import math

import jax
import numpy as np
import pytest
from helpers.loop_runs import Killed, interrupted, same
from helpers.run_files import reproducible_rows
from helpers.small_rounds import make_recipe

from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.huggingface import load_params
from mmpo_jax.checkpoints.peft import read_adapter_config
from mmpo_jax.checkpoints.steps import checkpoint_shapes
from mmpo_jax.core.trees import flatten
from mmpo_jax.models.lora import SCALE, is_adapter, merge_adapters
from mmpo_jax.training import loop

STEPS = 3  # of a round, see `small_rounds`

pytestmark = [pytest.mark.usefixtures("stubs"), pytest.mark.slow]


def quantized_recipe(output, model, **training):
    lora = {"target": "language_model/layers/.*/[qv]_proj", "rank": 2, "quantize_base": "int8"}
    options = make_recipe(output, model).training.model_dump(mode="json")
    options |= {"optimizer": {"learning_rate": 3e-2}, "lora": lora, **training}
    return make_recipe(output, model, training=options)


@pytest.fixture(scope="module")
def begun():
    """Parameters that trainings begin with, in order."""
    return []


@pytest.fixture(scope="module")
def run(stubs, tiny_folder, tmp_path_factory, begun):
    """Folder of a whole alignment; do not write there."""
    create = loop.create_state

    def kept(params, *args, **options):
        begun.append(jax.tree.map(np.asarray, params))
        return create(params, *args, **options)

    output = tmp_path_factory.mktemp("quantized") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "create_state", kept)
        run_alignment(quantized_recipe(output, tiny_folder, save_dtype="bfloat16"))
    return output


def trained(run, index):
    """What a round has trained: the quantised base and the adapters beside it."""
    return flatten(load_start(str(run / f"round-{index}" / "train"), quantization="int8").params)


def test_a_round_begins_where_the_last_one_ended(run, begun, tiny_folder):
    """With the same integers and the adapters of then, so that its first loss is ln 2."""
    same(flatten(begun[1]), jax.tree.map(np.asarray, trained(run, 1)))
    base = flatten(load_start(str(tiny_folder), quantization="int8").params)
    last = trained(run, 2)
    for path, leaf in base.items():
        np.testing.assert_array_equal(last[path], leaf, err_msg=path)
    moved = [path for path in last if is_adapter(path)]
    assert moved and all(not np.array_equal(last[p], trained(run, 1)[p]) for p in moved)
    for index in (1, 2):
        rows = reproducible_rows(run / f"round-{index}" / "train" / "metrics.jsonl")
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[-1]["loss"] != pytest.approx(math.log(2), abs=1e-5)


def test_what_is_written(run, tiny_folder, tiny_model):
    """Checkpoints have adapters alone, on the start of the alignment; a round's model, which the
    next one samples from, is that base with them merged."""
    for index in (1, 2):
        folder = run / f"round-{index}"
        saved = checkpoint_shapes(str(folder / "train" / "checkpoints" / f"{STEPS}"))
        assert saved and all(is_adapter(path) or path.endswith(SCALE) for path in saved)
        below = json.loads((folder / "train" / "base" / "below.json").read_text())
        assert (below["model"], below["quantization"]) == (str(tiny_folder), "int8")
        config = read_adapter_config(folder / "adapter")
        assert config["base_model_name_or_path"] == str(tiny_folder)
        merged = flatten(
            merge_adapters(load_start(str(folder / "train"), quantization="int8").params)
        )
        for path, leaf in flatten(load_params(folder / "model", tiny_model[0])).items():
            np.testing.assert_allclose(leaf, merged[path], rtol=0, atol=1e-6, err_msg=path)


def test_the_update_is_counted_from_the_base(run, tiny_model, tiny_folder):
    """Of both rounds, and without what rounding the base has changed."""
    (line,) = (
        line
        for line in (run / "model" / "README.md").read_text().splitlines()
        if "of the update" in line
    )
    start = load_start(str(tiny_folder), quantization="int8").params
    before, ours = (
        flatten(merge_adapters(tree))
        for tree in (start, load_start(str(run / "round-2" / "train")).params)
    )
    rounded = flatten(load_params(run / "model", tiny_model[0]))
    product = square = 0.0
    for path in ours:
        exact, first, kept = (np.float64(tree[path]) for tree in (ours, before, rounded))
        product += np.sum((exact - first) * (kept - first))
        square += np.sum((exact - first) ** 2)
    assert line.startswith(f"{product / square:.1%} of the update")


def test_a_killed_run_ends_as_an_undisturbed_one(run, tiny_folder, tmp_path):
    """Killed in the second round, behind a checkpoint."""
    recipe = quantized_recipe(tmp_path / "run", tiny_folder, save_dtype="bfloat16")
    with pytest.raises(Killed), interrupted(2 * STEPS):
        run_alignment(recipe)
    assert (tmp_path / "run" / "round-2" / "train" / "checkpoints" / "2").exists()
    run_alignment(recipe)
    for index in (1, 2):
        same(trained(tmp_path / "run", index), trained(run, index))
    for name in ("round-1/model", "round-2/model", "model"):
        ours, theirs = (folder / name / "model.safetensors" for folder in (tmp_path / "run", run))
        assert ours.read_bytes() == theirs.read_bytes()
