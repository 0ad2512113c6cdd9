"""Rounds that sample and judge on one mesh and train on another."""

import jax
import numpy as np
import pytest
from helpers.small_rounds import CoinLabeler, WordSplitter, make_recipe

from mmpo_jax.alignment import round as rounds
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.core.files import read_table
from mmpo_jax.core.trees import flatten
from mmpo_jax.feedback import judges
from mmpo_jax.parallel.mesh import make_mesh

SPLIT = {"data": 2, "fsdp": 2, "tensor": 2}


def meshes(checkpoint):
    return {tuple(leaf.sharding.mesh.shape.values()) for leaf in jax.tree.leaves(checkpoint.params)}


def test_a_checkpoint_is_read_again_onto_another_mesh(tiny_folder):
    one, other = make_mesh(fsdp=8), make_mesh(**SPLIT)
    first = load_checkpoint(str(tiny_folder), one)
    assert first.moved(one) is first
    moved = first.moved(other)
    assert meshes(moved) == {(2, 2, 2)} and not flatten(first.params)
    again = flatten(first.reloaded(one).params)
    for path, leaf in flatten(moved.params).items():
        np.testing.assert_array_equal(leaf, again[path])


def test_a_checkpoint_is_cast_until_it_is_trained(tiny_folder):
    mesh = make_mesh(fsdp=8)
    files = flatten(load_checkpoint(str(tiny_folder), mesh).params)
    narrow = load_checkpoint(str(tiny_folder), mesh, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in flatten(narrow.params).values()} == {"bfloat16"}
    narrow.release()
    narrow.restore(mesh)
    assert {leaf.dtype.name for leaf in flatten(narrow.params).values()} == {"bfloat16"}
    whole = narrow.moved(mesh)
    assert not flatten(narrow.params)
    for path, leaf in flatten(whole.params).items():
        np.testing.assert_array_equal(leaf, files[path])
    same = load_checkpoint(str(tiny_folder), mesh, dtype="float32")
    assert same.dtype is None and same.moved(mesh) is same


@pytest.mark.slow
def test_all_rounds_sample_in_what_training_computes_in(tmp_path, tiny_folder, monkeypatch):
    """Also from the float32 weights of a round before."""
    monkeypatch.setattr(judges, "make_splitter", lambda *args: (WordSplitter(), []))
    labeler = CoinLabeler, "coin", lambda: None
    monkeypatch.setattr(judges, "make_labeler", lambda *args: labeler)
    used = []
    for name in ("round_responses", "train_stage"):
        function = getattr(rounds, name)

        def looked(first, *arguments, function=function, **options):
            start = first.start
            (dtype,) = {leaf.dtype.name for leaf in jax.tree.leaves(start.params)}
            used.append(dtype)
            return function(first, *arguments, **options)

        monkeypatch.setattr(rounds, name, looked)
    training = {"batch_size": 8, "max_steps": 2, "log_every": 1, "compute_dtype": "bfloat16"}
    recipe = make_recipe(
        tmp_path / "run", tiny_folder, rounds=2, devices={"fsdp": 8}, training=training
    )
    run_alignment(recipe)
    assert used == ["bfloat16", "float32"] * 2


@pytest.mark.slow
def test_the_pairs_are_those_of_one_mesh(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(judges, "make_splitter", lambda *args: (WordSplitter(), []))
    labeler = CoinLabeler, "coin", lambda: None
    monkeypatch.setattr(judges, "make_labeler", lambda *args: labeler)
    used = {}
    for name in ("round_responses", "train_stage"):
        function = getattr(rounds, name)

        def looked(first, *arguments, name=name, function=function, **options):
            start = getattr(first, "start", None) or first.checkpoint
            used[name] = meshes(start)
            return function(first, *arguments, **options)

        monkeypatch.setattr(rounds, name, looked)
    training = {"batch_size": 8, "max_steps": 2, "log_every": 1}
    for name, inference in (("one", None), ("two", SPLIT)):
        recipe = make_recipe(
            tmp_path / name,
            tiny_folder,
            rounds=1,
            devices={"fsdp": 8},
            inference_devices=inference,
            training=training,
        )
        run_alignment(recipe)
        sizes = (1, 8, 1) if inference is None else (2, 2, 2)
        assert used == {"round_responses": {sizes}, "train_stage": {(1, 8, 1)}}
    for stage in ("generate", "judge", "pairs"):
        one, two = (
            read_table(tmp_path / name / "round-1" / f"{stage}.parquet") for name in ("one", "two")
        )
        assert repr(one.to_pylist()) == repr(two.to_pylist()), stage  # NaN is not NaN
    one, two = (load_model(tmp_path / name / "model")[1] for name in ("one", "two"))
    for path, leaf in flatten(one).items():
        np.testing.assert_allclose(flatten(two)[path], leaf, rtol=0, atol=1e-5, err_msg=path)
