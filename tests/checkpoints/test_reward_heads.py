"""Reward heads of checkpoints: made, kept in runs and adapters, and what is refused."""

import json

import numpy as np
import pytest
from helpers.reward_heads import KINDS, headed, save_headed

from mmpo_jax.checkpoints.checkpoint import check_speaker, load_start, open_reward_model
from mmpo_jax.checkpoints.huggingface import load_model, load_params
from mmpo_jax.checkpoints.locations import locate
from mmpo_jax.checkpoints.peft import save_adapter
from mmpo_jax.checkpoints.weights import load_model_config
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError, RewardHead
from mmpo_jax.models.lora import Lora, add_adapters, merge_adapters
from mmpo_jax.models.model import Model
from mmpo_jax.models.reward_head import is_reward_head, with_reward_head
from mmpo_jax.parallel.mesh import make_mesh, param_shardings


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head(tiny_folder, tiny_model, kind):
    """The weights below it are the policy's; the head is the seed's, on a mesh or not."""

    def start(seed, mesh=None):
        change = lambda config: with_reward_head(config, kind, "and ?")  # noqa: E731
        return load_start(str(tiny_folder), mesh=mesh, change=change, seed=seed)

    made, again, other = start(0), start(0, make_mesh()), start(1)
    assert made.model.config.reward_head == RewardHead(kind, "and ?")
    assert made.fingerprint == again.fingerprint != other.fingerprint
    below = flatten(tiny_model[1])
    for path, leaf in flatten(made.params).items():
        if is_reward_head(path):
            assert leaf.dtype == np.float32
            assert path.endswith("bias") or not np.array_equal(leaf, flatten(other.params)[path])
        else:
            np.testing.assert_array_equal(leaf, below[path], err_msg=path)
        np.testing.assert_array_equal(leaf, flatten(again.params)[path], err_msg=path)
    kernels = [leaf for path, leaf in flatten(made.params).items() if path.endswith("/kernel")]
    assert len(kernels) > 1
    made.release(["language_model/norm/scale"])
    assert "language_model/norm/scale" in flatten(made.reloaded(None).params)


@pytest.mark.parametrize("kind", KINDS)
def test_sharding_rules(tiny_model, kind):
    model, _ = headed(*tiny_model, kind)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    found = flatten(param_shardings(model.abstract_params(), model.rules, mesh))
    heads = {path: place.spec for path, place in found.items() if is_reward_head(path)}
    split = "score/kernel" if kind == "linear" else "rm_head/dense/kernel"
    assert heads[split][0] == "fsdp"
    assert len(heads) == (1 if kind == "linear" else 4)


def test_a_head_that_is_there_is_gone_on_with(tiny_folder, tiny_model, tmp_path):
    folder = save_headed(tmp_path / "model", tiny_folder, *tiny_model, critique_prompt="one ?")
    config = load_model(folder)[0].config
    inside = {"critique_prompt": "{question} {response}", "layout": "one_turn"}
    other = save_headed(tmp_path / "inside", tiny_folder, *tiny_model, **inside)
    head = RewardHead("linear", "{question} {response}", "one_turn")
    assert load_model(other)[0].config.reward_head == head
    again = with_reward_head(config, None, "two ?")
    assert again.reward_head == RewardHead("linear", "two ?")
    with pytest.raises(ModelError, match="there is a head of type linear, which training goes on"):
        with_reward_head(config, "two_layer", None)
    assert with_reward_head(tiny_model[0].config, None, None) == tiny_model[0].config


def test_what_each_is_for(tiny_folder, tiny_model, tmp_path):
    folder = save_headed(tmp_path / "model", tiny_folder, *tiny_model)
    with pytest.raises(ModelError, match=r"is a reward model, which scores .* takes a policy"):
        check_speaker(str(folder), "generation")
    check_speaker(str(tiny_folder), "generation")
    with pytest.raises(ModelError, match="has no reward head"):
        open_reward_model(str(tiny_folder))


def test_tensors_of_a_head_that_the_config_does_not_know(tiny_folder, tiny_model, tmp_path):
    folder = save_headed(tmp_path / "model", tiny_folder, *tiny_model)
    config = json.loads((folder / "config.json").read_text())
    del config["reward_head"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"unexpected tensor score\.weight: the head of a reward"):
        load_params(folder, Model.create(load_model_config(locate(str(folder)))))
    config["reward_head"] = {"type": "linear", "labels": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"reward_head is .* it has the keys critique_l"):
        load_model_config(locate(str(folder)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_reward_model", [False, True])
def test_adapters_bring_their_head(tiny_folder, tiny_model, tmp_path, kind, on_reward_model):
    """PEFT's `modules_to_save`; whether or not the base has a head of its own."""
    model, params = headed(*tiny_model, kind, "and ?")
    base = tiny_folder
    if on_reward_model:
        base = save_headed(tmp_path / "base", tiny_folder, *tiny_model, kind=kind, seed=7)
    trained = add_adapters(params, model, Lora(rank=2), (), 0)
    rng = np.random.default_rng(0)
    noisy = {
        path: leaf + 0.1 * rng.standard_normal(leaf.shape).astype("f")
        if path.endswith("lora_b")
        else leaf
        for path, leaf in flatten(trained).items()
    }
    trained = unflatten(noisy)
    save_adapter(tmp_path / "adapter", model, trained, base=str(base), dropout=0.0)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["modules_to_save"] == [{"linear": "score", "two_layer": "rm_head"}[kind]]
    found = load_start(str(tmp_path / "adapter"), mesh=make_mesh())
    assert found.model.config.reward_head == RewardHead(kind, "and ?")
    wanted = flatten(merge_adapters(trained))
    assert flatten(found.params).keys() == wanted.keys()
    for path, leaf in flatten(found.params).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=0, atol=1e-6, err_msg=path)
