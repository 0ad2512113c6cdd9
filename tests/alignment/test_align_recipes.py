"""Alignments of other recipes: their prompts, their feedback, their adapters."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import meshes
from helpers.small_rounds import PROMPTS, make_recipe

from mmpo_jax.alignment import align
from mmpo_jax.alignment.align import run_alignment, split_prompts
from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.fingerprints import fingerprint_model
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.checkpoints.peft import base_model, save_adapter
from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import read_table
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.feedback import judges
from mmpo_jax.feedback.claims import judgement_of
from mmpo_jax.feedback.labeler import Answer
from mmpo_jax.generation import responses as responses_module
from mmpo_jax.models.lora import Lora, add_adapters
from mmpo_jax.recipes.feedback import ClaimsFeedback
from mmpo_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("stubs")
MAKE_SPLITTER, MAKE_LABELER = judges.make_splitter, judges.make_labeler


def test_what_cannot_be_read_is_a_rejected_claim():
    row = {
        "claims": ["there is a red circle ."],
        "questions": ["is there a red circle in the picture ?"],
        "unparsed": ["a"],
        "failure": None,
        "raw": None,
    }
    answers = {"is there a red circle in the picture ?": Answer(0.9, 0.1)}
    judgement = judgement_of(row, answers, ClaimsFeedback())
    verdicts = judgement.details["verdicts"]
    assert [verdict["claim"] for verdict in verdicts] == ["there is a red circle .", "a"]
    assert [verdict["p_yes"] for verdict in verdicts] == [0.9, 0.0]
    assert judgement.score == -1


def test_too_few_prompts(tiny_folder, tmp_path):
    recipe = make_recipe(tmp_path, tiny_folder, prompts_per_round=20)
    with pytest.raises(MmpoError, match="2 rounds of 20 prompts need 40, the data has 30 usable"):
        run_alignment(recipe)
    assert not (tmp_path / "round-1").exists()


def test_all_prompts_in_every_round(tiny_folder, tmp_path):
    recipe = make_recipe(tmp_path, tiny_folder, prompts_per_round=None)
    assert split_prompts(["a", "b"], recipe) == [["a", "b"], ["a", "b"]]


def test_prompts_that_do_not_fit(tiny_folder, tmp_path):
    recipe = make_recipe(tmp_path, tiny_folder, lengths={"prompt": [8], "response": [16]})
    with pytest.raises(DataError, match="prompt_too_long 30"):
        run_alignment(recipe)


@pytest.mark.slow
def test_the_true_feedback_of_the_picture_world(tiny_folder, tmp_path, monkeypatch):
    """The recipe's own splitter and labeler run too; a random model just earns no pairs by them."""
    monkeypatch.undo()
    text = "there is a red star and two blue rings ."

    def speak(*args, **options):
        return [dataclasses.replace(g, text=text) for g in generate(*args, **options)]

    generate = responses_module.generate_responses
    monkeypatch.setattr(responses_module, "generate_responses", speak)
    mesh = meshes.one_device()
    monkeypatch.setattr(align, "make_mesh", lambda **sizes: mesh)
    monkeypatch.setattr(judges, "make_splitter", MAKE_SPLITTER)
    monkeypatch.setattr(judges, "make_labeler", MAKE_LABELER)
    recipe = make_recipe(
        tmp_path,
        tiny_folder,
        evaluation=None,
        rounds=1,
        lengths={"prompt": [16], "response": [24]},
    )
    with pytest.raises(MmpoError, match="no preference pair is left"):
        run_alignment(recipe)
    judged = read_table(tmp_path / "round-1" / "conquer.parquet").to_pylist()
    assert len(judged) == 2 * PROMPTS
    assert all(0 < row["p_yes"] < 1 and 0 < row["p_no"] < 1 for row in judged)
    assert len({row["p_yes"] for row in judged}) > PROMPTS  # the images are seen
    manifest = json.loads((tmp_path / "round-1" / "conquer.json").read_text())
    assert manifest["inputs"]["labeler"] == fingerprint_model(tiny_folder)


@pytest.mark.slow
def test_rounds_with_adapters_from_an_adapter(tiny_folder, tiny_model, tmp_path):
    """Each round starts from the merged model of the last, the first from a named adapter."""
    model, params = tiny_model
    adapted = add_adapters(params, model, Lora(target=".*/v_proj", rank=2), (), 0)
    adapted = {
        path: leaf + 0.1 if path.endswith("lora_b") else leaf
        for path, leaf in flatten(adapted).items()
    }
    first = tmp_path / "adapter"
    save_adapter(first, model, unflatten(adapted), base=str(tiny_folder), dropout=0.0)
    output = tmp_path / "run"
    training = {
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 4,
        "max_steps": 2,
        "log_every": 1,
        "save_every": 2,
        "lora": {"target": "language_model/.*/q_proj", "rank": 2, "dropout": 0.1},
    }
    run_alignment(make_recipe(output, first, training=training, evaluation=None))
    for index, base in ((1, first), (2, output / "round-1" / "model")):
        folder = output / f"round-{index}"
        assert base_model(folder / "adapter") == str(base)
        merged = flatten(load_model(folder / "model")[1])
        before = flatten(load_start(str(base)).params)
        moved = [path for path in merged if not np.array_equal(merged[path], before[path])]
        assert moved == ["language_model/layers/self_attn/q_proj/kernel"]
        for path, leaf in flatten(load_start(str(folder / "adapter")).params).items():
            np.testing.assert_allclose(leaf, merged[path], rtol=0, atol=1e-6, err_msg=path)
        assert read_metrics(folder / "train" / "metrics.jsonl")[0]["loss"] == pytest.approx(
            np.log(2), abs=1e-5
        )
    assert fingerprint_model(output / "model") == fingerprint_model(output / "round-2" / "model")
