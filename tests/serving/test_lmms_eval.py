"""lmms-eval asks a task of its own format: through its `openai` model, and through our plug-in."""

import importlib.metadata
import json
import tomllib
from pathlib import Path

import pytest

pytest.importorskip(
    "lmms_eval.evaluator",
    reason="needs lmms-eval 0.7.3 and filelock<4, in an environment of its own",
    exc_type=ImportError,
)
pytest.importorskip("openai", reason="needs pip install 'mmpo_jax[bridges]'")
pytest.importorskip("uvicorn", reason="needs pip install 'mmpo_jax[bridges]'")

import lmms_eval.evaluator
import lmms_eval.models
from helpers.served import picture
from lmms_eval.tasks import TaskManager

from mmpo_jax.serving.lmms_eval_plugin import manifest

ROOT = Path(__file__).parents[2]
TASK = """
task: shapes
dataset_path: json
dataset_kwargs:
  data_files: {test: DATA}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes.visual
doc_to_text: !function shapes.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 24, temperature: 0, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
FUNCTIONS = """
import io
from PIL import Image

def visual(doc):
    return [Image.open(io.BytesIO(bytes.fromhex(doc["picture"]))).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
ASKED = [("describe the picture .", seed) for seed in range(5)] + [("is there a star ?", 9)]


@pytest.fixture
def task(tmp_path, greedy):
    """A folder with a task whose right answers are the greedy ones of `mmpo generate`."""
    answers = greedy([(text, picture(seed)) for text, seed in ASKED])
    rows = [
        {"question": text, "picture": picture(seed).hex(), "answer": answer}
        for (text, seed), answer in zip(ASKED, answers, strict=True)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "shapes.py").write_text(FUNCTIONS)
    (tmp_path / "shapes.yaml").write_text(TASK.replace("DATA", str(data)))
    return tmp_path


def evaluate(task, model, arguments, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task / "cache"))
    found = lmms_eval.evaluator.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["shapes"],
        batch_size=4,
        task_manager=TaskManager("ERROR", include_path=str(task), model_name=model),
        log_samples=True,
        bootstrap_iters=0,
    )
    (score,) = (v for k, v in found["results"]["shapes"].items() if k.startswith("exact_match,"))
    samples = sorted(found["samples"]["shapes"], key=lambda row: row["doc_id"])
    return score, [row["filtered_resps"][0] for row in samples]


@pytest.mark.slow
def test_its_openai_model(task, service, monkeypatch, greedy):
    arguments = f"model=picture_world,base_url={service[1]},api_key=none,num_concurrent=4"
    score, answers = evaluate(task, "openai", arguments, monkeypatch)
    assert answers == greedy([(text, picture(seed)) for text, seed in ASKED])
    assert score == 1


@pytest.mark.slow
def test_our_plug_in(task, monkeypatch, greedy):
    lmms_eval.models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    score, answers = evaluate(task, "mmpo_jax", "model=builtin:picture_world", monkeypatch)
    assert answers == greedy([(text, picture(seed)) for text, seed in ASKED])
    assert score == 1


def test_until_ends_answers_but_by_default():
    import numpy as np

    from mmpo_jax.generation.responses import Generated
    from mmpo_jax.serving.lmms_eval_model import _result

    made = Generated("1", 0, "a\n\nb. c", 5, True, np.zeros(5, np.int32))
    ends = {"\n\n": "a\n\nb. c", ".": "a\n\nb"}
    for until, text in ends.items():
        for given in (until, [until]):
            assert _result(made, 1, {"until": given}).text == text
    assert _result(made, 1, {"until": ["\n\n", "x"]}).text == "a"


def test_the_entry_point_is_the_manifest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["lmms_eval.models"].values()
    point = importlib.metadata.EntryPoint("mmpo_jax", value, "lmms_eval.models")
    assert point.load()() == manifest()
