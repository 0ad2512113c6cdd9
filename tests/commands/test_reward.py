"""`mmpo reward` as a command: its rows, what they do not depend on, its errors, and going on."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import meshes
from helpers.reward_heads import save_headed, write_jsonl
from helpers.score_rows import read_rows
from safetensors.numpy import load_file, save_file

from mmpo_jax import cli
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.reward_models import critiques
from mmpo_jax.reward_models import rewards as module
from mmpo_jax.scoring import stage

ASK = "is the star there ?"
SHORT = ("--max-new-tokens", "8")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    mesh = meshes.one_device()
    for name in ("generate", "reward"):
        monkeypatch.setattr(f"mmpo_jax.commands.{name}.make_mesh", lambda **sizes: mesh)


@pytest.fixture(scope="module")
def critic(tiny_folder, tiny_model, tmp_path_factory):
    """A reward model that writes critiques."""
    folder = tmp_path_factory.mktemp("critic") / "model"
    return save_headed(folder, tiny_folder, *tiny_model, kind="two_layer", critique_prompt=ASK)


@pytest.fixture(scope="module")
def evaluator(tiny_folder, tiny_model, tmp_path_factory):
    """One that reads question and response within one turn of the user, as MM-RLHF's code."""
    folder = tmp_path_factory.mktemp("evaluator") / "model"
    asked = {"critique_prompt": "is {response} there ? {question}", "layout": "one_turn"}
    return save_headed(folder, tiny_folder, *tiny_model, kind="two_layer", **asked)


@pytest.fixture(scope="module")
def scalar(tiny_folder, tiny_model, tmp_path_factory):
    """A reward model that reads responses alone."""
    folder = tmp_path_factory.mktemp("scalar") / "model"
    return save_headed(folder, tiny_folder, *tiny_model)


@pytest.fixture
def rows(tmp_path):
    """Rows about pictures, two of them with one id, with critiques."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png_bytes(sample_scene("test", 0, number), 24))
    said = [("a red star", "two blue rings and a ring"), ("yes", "no"), ("a ring", "a star")]
    return [
        {
            "id": name,
            "images": [f"{number}.png"],
            "prompt": "what is in the picture ?" if number else "a star ?",
            "chosen": chosen,
            "rejected": rejected,
            "chosen_reason": "yes , there is",
            "rejected_reason": "no" if number else "the ring is red",
        }
        for number, (name, (chosen, rejected)) in enumerate(zip("aab", said, strict=True))
    ]


@pytest.fixture
def reward(tmp_path, capsys):
    """Runs the command; its rows."""

    def reward(model, data, *more, output="out.jsonl"):
        path = data if isinstance(data, Path) else write_jsonl(tmp_path / "rows.jsonl", data)
        out = tmp_path / output
        flags = ["--model", str(model), "--data", str(path), "--output", str(out)]
        status = cli.main(["reward", *flags, *more])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        assert str(out) in captured.out
        assert not (tmp_path / "out.parts").exists()
        return read_rows(out)

    return reward


def test_rows_of_one_id_stay_apart(reward, critic, rows):
    found = reward(critic, rows, "--given-critiques")
    assert [row["id"] for row in found] == ["a", "a (row 2)", "b"]
    assert [row["critiques"] for row in found] == [
        [[row["chosen_reason"]], [row["rejected_reason"]]] for row in rows
    ]
    assert [row["std"] for row in found] == [[0, 0]] * 3
    assert len({tuple(row["rewards"]) for row in found}) == 3


@pytest.mark.parametrize("flags", [("--given-critiques",), SHORT])
@pytest.mark.slow
def test_a_reward_depends_on_its_row_and_response_alone(reward, critic, rows, flags):
    """Not on siblings, the rows beside it, or how many are computed at once."""
    whole = reward(critic, rows, *flags)
    texts = [[row["chosen"], row["rejected"]] for row in rows]
    turned = [
        {"id": row["id"], "images": row["images"], "prompt": row["prompt"]}
        | {"chosen": row["rejected"], "rejected": row["chosen"]}
        | {"chosen_reason": row["rejected_reason"], "rejected_reason": row["chosen_reason"]}
        for row in rows
    ]
    for order, size in (([2], "1"), ([2, 1], "8"), ([1, 0, 2], "2")):
        found = reward(critic, [turned[i] for i in order], *flags, "--batch-size", size)
        for place, row in zip(order, found, strict=True):
            ours = dict(zip(texts[place][::-1], row["rewards"], strict=True))
            theirs = dict(zip(texts[place], whole[place]["rewards"], strict=True))
            for text, value in theirs.items():
                assert ours[text] == pytest.approx(value, abs=2e-5)


@pytest.mark.parametrize("name", ["critic", "evaluator"])
@pytest.mark.slow
def test_several_critiques_are_averaged_exactly(reward, request, name, rows, tmp_path):
    """Each is scored as if it were given, in a file of its own."""
    critic = request.getfixturevalue(name)
    flags = ("--critiques", "3", "--temperature", "1", *SHORT)
    found = reward(critic, rows, *flags)
    assert all(len(own) == 3 for row in found for own in row["critiques"])
    assert any(len(set(own)) > 1 for row in found for own in row["critiques"])
    singles = []
    for k in range(3):
        given = [
            row
            | {"chosen_reason": sampled["critiques"][0][k] or "x"}
            | {"rejected_reason": sampled["critiques"][1][k] or "x"}
            for row, sampled in zip(rows, found, strict=True)
        ]
        assert all(sampled["critiques"][i][k] for sampled in found for i in range(2))
        singles.append([row["rewards"] for row in reward(critic, given, "--given-critiques")])
    np.testing.assert_allclose(
        [row["rewards"] for row in found], np.mean(singles, axis=0), rtol=0, atol=2e-6
    )
    np.testing.assert_allclose(
        [row["std"] for row in found], np.std(singles, axis=0), rtol=0, atol=2e-6
    )
    assert reward(critic, rows, *flags) == found
    assert reward(critic, rows, *flags, "--seed", "1") != found


@pytest.mark.slow
def test_equal_responses_have_equal_rewards(reward, critic, rows):
    row = rows[0] | {"rejected": rows[0]["chosen"]}
    row = {key: value for key, value in row.items() if not key.endswith("_reason")}
    row |= {"is_tie": True}
    (found,) = reward(critic, [row], "--critiques", "2", "--temperature", "1", *SHORT)
    assert found["rewards"][0] == found["rewards"][1]
    assert found["critiques"][0] == found["critiques"][1]


def test_a_scalar_model_writes_nothing(reward, scalar, rows):
    found = reward(scalar, rows)
    assert [row["critiques"] for row in found] == [[[], []]] * 3
    without = [{k: v for k, v in row.items() if "_reason" not in k} for row in rows]
    assert reward(scalar, without) == found


def test_responses_that_cannot_be_used_keep_their_places(reward, scalar, tmp_path):
    row = {"id": "a", "prompt": "a star ?", "responses": ["yes", 7, "no", "a ring " * 9]}
    (found,) = reward(scalar, [row], "lengths={prompt: [24], response: [12]}")
    assert found["rewards"][1::2] == found["std"][1::2] == [None, None]
    assert None not in (found["rewards"][0], found["rewards"][2])
    assert found["critiques"] == [[]] * 4
    bad, long = found["problems"][1::2]
    assert found["problems"][::2] == [None, None] and bad.startswith("bad_message: ")
    assert long.startswith("response_too_long: ") and "the limit is 12" in long
    left_out = read_rows(tmp_path / "out.rejected_rows.jsonl")
    assert [row["detail"].partition(":")[0] for row in left_out] == ["response 2", "response 4"]
    (whole,) = reward(scalar, [row | {"responses": ["yes", "no"]}])
    assert "problems" not in whole
    assert found["rewards"][::2] == pytest.approx(whole["rewards"], abs=2e-5)


def published_rows(name, folder):
    """A file of rows in the published layout of a benchmark."""
    said = [("yes", "no"), ("a red star", "two ring"), ("a star", "blue"), ("red", "ring")]
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png_bytes(sample_scene("test", 0, number), 24))
    if name == "multimodal_rewardbench":
        rows = [
            {"ID": f"Math{n}", "Category": "reasoning", "Image": f"{n}.png", "Text": "a star ?"}
            | {"Output1": first, "Output2": second, "Better": f"Output{n % 2 + 1}"}
            for n, (first, second) in enumerate(said)
        ]
        (folder / "all_data.json").write_text(json.dumps(rows))
        return folder / "all_data.json"
    rows = [
        {"id": "RLAIF-V_1" if n < 2 else "wildvision", "query": "a star ?", "response": [*pair]}
        | {"human_ranking": [n % 2, 1 - n % 2]}
        | {"image": {"bytes": (folder / f"{n}.png").read_bytes(), "path": None}}
        for n, pair in enumerate(said)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    return folder / "test-00000-of-00001.parquet"


@pytest.mark.parametrize("name", ["vl_rewardbench", "multimodal_rewardbench"])
def test_from_published_rows_to_the_official_numbers(reward, scalar, tmp_path, capsys, name):
    """Two commands, with ids that repeat and a row whose image is not there."""
    data = tmp_path / "data"
    data.mkdir()
    path = published_rows(name, data)
    gone = name == "multimodal_rewardbench"
    if gone:
        (data / "0.png").unlink()
    found = reward(scalar, path, "data.max_skipped=0.5")
    flags = ["--data", str(data), "--responses", str(tmp_path / "out.jsonl")]
    out = tmp_path / "scores.json"
    assert cli.main(["evaluate", "--benchmark", name, *flags, "--output", str(out)]) == 0
    capsys.readouterr()
    scores = json.loads(out.read_text())
    assert len(found) == 4 - gone
    right = [
        (row["rewards"][0] > row["rewards"][1]) == (place % 2 == 0)
        for place, row in enumerate(found, start=int(gone))
    ]
    share = sum(right) / 4
    overall = {"vl_rewardbench": "Overall Accuracy", "multimodal_rewardbench": "acc all"}[name]
    assert scores["metrics"][overall] == (share if gone else 100 * share)
    assert scores["beside"]["without_rewards"] == gone
    if not gone:
        names = ["RLAIF-V_1", "RLAIF-V_1 (row 2)", "wildvision", "wildvision (row 4)"]
        assert [row["id"] for row in found] == names
        groups = [scores["metrics"][group] for group in ("hallucination", "general")]
        assert groups == [50 * sum(right[:2]), 50 * sum(right[2:])]


class Killed(BaseException):
    """What nothing expects."""


@pytest.mark.slow
def test_a_killed_run_goes_on(reward, critic, rows, tmp_path, monkeypatch):
    """Critiques that are there are not sampled again, parts of rewards not computed again."""
    whole = reward(critic, rows, *SHORT)
    monkeypatch.setattr(stage, "ROWS_PER_PART", 1)
    compute, calls = module._compute, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return compute(*arguments)

    monkeypatch.setattr(module, "_compute", dies)
    out = tmp_path / "again.jsonl"
    arguments = ["--model", str(critic), "--data", str(tmp_path / "rows.jsonl")]
    with pytest.raises(Killed):
        cli.main(["reward", *arguments, "--output", str(out), *SHORT])
    assert not out.exists()
    monkeypatch.setattr(critiques, "sample_tokens", None)
    again = reward(critic, tmp_path / "rows.jsonl", *SHORT, output="again.jsonl")
    for ours, theirs in zip(again, whole, strict=True):
        assert ours.pop("rewards") == pytest.approx(theirs.pop("rewards"), abs=2e-5)
    assert again == whole
    assert len(calls) == 4  # of three parts one was there


@pytest.fixture
def refused(tmp_path, capsys, rows):
    def refused(command, model, *more, data=rows):
        path = write_jsonl(tmp_path / "rows.jsonl", data)
        flags = ["--model", str(model), "--data", str(path), "--output", str(tmp_path / "o.jsonl")]
        assert cli.main([command, *flags, *more]) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    return refused


def test_refusals(refused, critic, scalar, tiny_folder, rows):
    told = refused("reward", tiny_folder)
    assert f"{tiny_folder}: has no reward head, so it scores nothing; `mmpo train` makes" in told
    told = refused("generate", critic)
    assert f"{critic}: is a reward model, which scores responses (`mmpo reward --model" in told
    for flags in (("--critiques", "2"), ("--given-critiques",)):
        told = refused("reward", scalar, *flags)
        assert f"{scalar}: was trained to score responses without critiques" in told
    told = refused("reward", critic, "--critiques", "2", "--temperature", "0")
    assert "temperature: at 0 all 2 critiques would be the same" in told
    del rows[0]["chosen_reason"]
    told = refused("reward", critic, "--given-critiques", data=rows)
    assert "no_critique 1" in told and "a response without a critique" in told


def test_a_head_of_another_size(refused, scalar, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(scalar, folder)
    config = json.loads((folder / "config.json").read_text())
    config["reward_head"]["type"] = "two_layer"
    (folder / "config.json").write_text(json.dumps(config))
    told = refused("reward", folder)
    assert "unexpected tensor score.weight" in told
    score = np.zeros((1, 7), "f")
    files = [*folder.glob("*.safetensors")]
    held = {name: value for file in files for name, value in load_file(file).items()}
    config["reward_head"]["type"] = "linear"
    (folder / "config.json").write_text(json.dumps(config))
    save_file(held | {"score.weight": score}, files[0])
    told = refused("reward", folder)
    assert "score.weight has shape (1, 7), the config gives (1, 32); a head is of the model" in told
    config["reward_head"]["type"] = "three_layer"
    (folder / "config.json").write_text(json.dumps(config))
    told = refused("reward", folder)
    assert "reward_head.type is 'three_layer'; this version implements linear, two_layer" in told
    config |= {"reward_head": None, "architectures": ["LlamaForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    told = refused("reward", folder)
    assert "LlamaForSequenceClassification with num_labels 2: a reward model has one out" in told


@pytest.mark.skipif(
    "MMPO_MM_REWARD_BENCH" not in os.environ,
    reason="MMPO_MM_REWARD_BENCH does not name MM-RLHF's mm_reward_bench.jsonl",
)
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("qwen2_5_vl", ("--given-critiques",)),
        ("llava_onevision", ("--given-critiques",)),
        ("llava_onevision", ("--max-new-tokens", "4")),
    ],
)
@pytest.mark.slow
def test_the_published_reward_bench(reward, family_case, tmp_path, capsys, name, flags):
    """Its 170 pairs with images and videos, and then its numbers. The media are no part of the file
    and made here."""
    case = family_case(name)
    folder = tmp_path / "critic"
    save_headed(folder, case.folder, case.model, case.params, kind="two_layer", critique_prompt=ASK)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2**20
    (folder / "config.json").write_text(json.dumps(config))
    bench = Path(os.environ["MMPO_MM_REWARD_BENCH"])
    rows = read_rows(bench)
    for number, row in enumerate(rows):
        picture = png_bytes(sample_scene("test", 0, number % 7), 28)
        frames = [row["image"]] if "image" in row else [f"{row['video']}/{n}.png" for n in (1, 2)]
        for file in frames:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(picture)
    found = reward(folder, rows, *flags, "--batch-size", "32")
    assert [row["id"].partition(" (row ")[0] for row in found] == [row["id"] for row in rows]
    assert len(found) == 170 and len({row["id"] for row in found}) == 170
    values = np.array([row["rewards"] for row in found])
    assert values.shape == (170, 2) and np.isfinite(values).all() and values.std() > 0
    if "--given-critiques" in flags:
        for row, given in zip(found, rows, strict=True):
            assert row["critiques"] == [[given["chosen_reason"]], [given["rejected_reason"]]]
    out = tmp_path / "scores.json"
    files = ["--data", str(bench), "--responses", str(tmp_path / "out.jsonl")]
    command = ["evaluate", "--benchmark", "mm_rlhf_rewardbench", *files, "--output", str(out)]
    assert cli.main(command) == 0, capsys.readouterr().err
    scores = json.loads(out.read_text())
    assert scores["beside"]["pairs"] == 170 and scores["beside"]["without_rewards"] == 0
    accuracy = np.mean(values[:, 0] > values[:, 1])
    assert scores["metrics"]["Overall Accuracy"] == pytest.approx(accuracy)
