"""Two tiny rounds end to end: what is written, what is done again and what is not."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import tiny
from helpers.small_rounds import PROMPTS, ROUNDS, SAMPLES, STAGES, WordSplitter, make_recipe

from mmpo_jax.alignment import align
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.fingerprints import fingerprint_model
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.core import progress, stages
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import fingerprint_file, read_table
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.records import ImageRef
from mmpo_jax.feedback import judge, judges
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.training import stage as stage_module
from mmpo_jax.training.metrics import read_metrics

ASKED = [f"picture_world-{way}" for way in ("sampled-0", "greedy", "questions")]
"""Stages of an evaluation, which is a piece of work itself, as are its benchmark and the questions
that are kept for the report."""
EVALUATION = 3 + len(ASKED)

pytestmark = pytest.mark.usefixtures("stubs")


@pytest.fixture
def work_done(monkeypatch):
    """What is really computed by a call: (round folder, stage) in order."""
    done = []

    def count(stage, make_part, *finished):
        def make(part):
            done.append((Path(stage.folder).name, stage.name))
            return make_part(part)

        return original(stage, make, *finished)

    original = stages.run_stage
    monkeypatch.setattr(stages, "run_stage", count)
    monkeypatch.setattr("mmpo_jax.scoring.stage.run_stage", count)
    monkeypatch.setattr("mmpo_jax.generation.responses.run_stage", count)
    train = stage_module.train

    def counted(*args):
        done.append((Path(args[-1].folder).parent.name, "train"))
        return train(*args)

    monkeypatch.setattr(stage_module, "train", counted)
    return done


def files(folder):
    """Relative name -> contents of what has to be the same in every run."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (path.suffix == ".parquet" or "model/" in path.as_posix())
    }


def test_files_of_the_stages(finished, tiny_folder):
    output, _ = finished
    for index in range(1, ROUNDS + 1):
        folder = output / f"round-{index}"
        names = {path.name for path in folder.iterdir()}
        assert names == {
            *(f"{stage}.parquet" for stage in STAGES),
            *(f"{stage}.json" for stage in STAGES),
            "train",
            "train.json",
            "examples.txt",
            "labeler_rate.json",
            "timings.json",
            "model",
            "evaluation.json",
            "evaluation",
        }
    names = {path.name for path in (output / "round-0").iterdir()}
    assert names == {"evaluation.json", "evaluation"}
    assert {path.name for path in output.iterdir()} == {
        "round-0",
        "round-1",
        "round-2",
        "model",
        "model.json",
        "recipe.json",
        "report.html",
        "rounds.json",
        "rounds.txt",
        "tax.json",
    }
    assert fingerprint_model(output / "model") == fingerprint_model(output / "round-2" / "model")
    assert fingerprint_model(output / "model") != fingerprint_model(tiny_folder)


def test_reports(finished):
    output, reports = finished
    assert [report.index for report in reports] == [0, 1, 2]
    for report in reports[1:]:
        assert (report.prompts, report.responses) == (PROMPTS, PROMPTS * SAMPLES)
        assert 0 < report.rejected_claims < report.claims
        assert report.pairs == report.counts["pairs"] > 0
        assert 0 <= report.dpo_accuracy <= 1
    for report in reports:
        names = {"sampled/chair_s", "greedy/recall", "yes_no_accuracy"}
        assert {f"picture_world/{name}" for name in names} <= report.metrics.keys()
    rows = json.loads((output / "rounds.json").read_text())
    assert rows == [dataclasses.asdict(report) for report in reports]


def test_tables_belong_together(finished):
    for index in (1, 2):
        folder = finished[0] / f"round-{index}"
        tables = {name: read_table(folder / f"{name}.parquet").to_pylist() for name in STAGES}
        generated = {(row["prompt_id"], row["sample"]): row["text"] for row in tables["generate"]}
        assert len(generated) == PROMPTS * SAMPLES
        asked = {(row["prompt_id"], row["question"]) for row in tables["conquer"]}
        assert len(asked) == len(tables["conquer"])  # each question once an image
        assert asked == {
            (row["prompt_id"], question)
            for row in tables["divide"]
            for question in row["questions"]
        }
        for pair in tables["pairs"]:
            assert generated[pair["prompt_id"], pair["chosen_sample"]] == pair["chosen"]
            assert generated[pair["prompt_id"], pair["rejected_sample"]] == pair["rejected"]
            assert pair["chosen_score"] > pair["rejected_score"]
        pairs = {
            f"{pair['prompt_id']}/{pair['chosen_sample']}-{pair['rejected_sample']}"
            for pair in tables["pairs"]
        }
        scored = [row["id"] for row in tables["reference"]]  # of those within `max_steps`
        assert scored and len(set(scored)) == len(scored) and pairs >= set(scored)


def test_prompts_of_the_rounds_are_disjoint(finished):
    first, second = (
        set(read_table(finished[0] / f"round-{i}" / "generate.parquet")["prompt_id"].to_pylist())
        for i in (1, 2)
    )
    assert len(first) == len(second) == PROMPTS
    assert not first & second


def test_the_second_round_goes_on_from_the_first_and_is_its_own_reference(finished, tiny_folder):
    output, _ = finished
    starts = [fingerprint_model(tiny_folder), fingerprint_model(output / "round-1" / "model")]
    assert starts[0] != starts[1]
    for index, start in enumerate(starts, start=1):
        folder = output / f"round-{index}"
        for stage in ("generate", "reference"):
            manifest = json.loads((folder / f"{stage}.json").read_text())
            assert manifest["inputs"]["model"] == start
        assert json.loads((folder / "train.json").read_text())["inputs"]["model"] == start
        # Policy = reference at step 0, or it would not be ln 2.
        first = read_metrics(folder / "train" / "metrics.jsonl")[0]
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-3)


def test_training_moved_the_model(finished, tiny_model):
    trained = flatten(load_model(finished[0] / "model")[1])
    start = flatten(tiny_model[1])
    assert any(not np.array_equal(trained[path], start[path]) for path in start)


def test_a_second_call_does_nothing_again(finished, copy, tiny_folder, work_done):
    before = files(copy)
    assert run_alignment(make_recipe(copy, tiny_folder)) == finished[1]
    assert work_done == []
    assert files(copy) == before


@pytest.mark.slow
def test_the_last_folder_alone_is_rounded(finished, copy, tiny_folder, work_done, monkeypatch):
    """Rounds go on from float32, so another dtype makes nothing again."""
    save, told = align.save_weights, []
    monkeypatch.setattr(align, "save_weights", lambda *a: (told.append(a[-1]), save(*a))[1])
    recipe = make_recipe(copy, tiny_folder)
    training = recipe.training.model_copy(update={"save_dtype": "bfloat16"})
    for _ in range(2):  # the second time it is there
        run_alignment(recipe.model_copy(update={"training": training}))
        saved, last = (flatten(load_model(copy / at)[1]) for at in ("model", "round-2/model"))
        assert {leaf.dtype.name for leaf in last.values()} == {"float32"}
        for path, leaf in last.items():
            np.testing.assert_array_equal(saved[path], leaf.astype(ml_dtypes.bfloat16))
        card = (copy / "model" / "README.md").read_text()
        assert "of the update is in the saved weights." in card
        assert "rewards/margins of " in card
    (run,) = told  # which has it all, should much be lost
    assert run == str(copy / "round-2" / "train")
    load_start(run)
    assert not work_done
    run_alignment(recipe)
    assert files(copy) == files(finished[0])


@pytest.mark.parametrize("stage", STAGES[:-1])
@pytest.mark.slow
def test_a_deleted_file_is_made_again_alone(copy, tiny_folder, work_done, stage):
    """It comes out the same, so nothing that was made from it is touched."""
    before = files(copy)
    (copy / "round-1" / f"{stage}.parquet").unlink()
    run_alignment(make_recipe(copy, tiny_folder))
    assert work_done == [("round-1", stage)]
    assert files(copy) == before


@pytest.mark.slow
def test_a_deleted_model_is_made_again_from_its_checkpoints(copy, tiny_folder, work_done):
    before = files(copy)
    shutil.rmtree(copy / "round-1" / "model")
    run_alignment(make_recipe(copy, tiny_folder))
    assert work_done == [("round-1", "train")]
    assert files(copy) == before


@pytest.mark.slow
def test_removed_checkpoints_are_not_missed(finished, copy, tiny_folder, work_done):
    """They are large; a finished round needs only its model."""
    for index in (1, 2):
        shutil.rmtree(copy / f"round-{index}" / "train")
    reports = run_alignment(make_recipe(copy, tiny_folder))
    assert work_done == []
    assert [report.pairs for report in reports] == [report.pairs for report in finished[1]]


@pytest.mark.slow
def test_a_changed_setting_makes_again_what_depends_on_it(finished, copy, tiny_folder, work_done):
    recipe = make_recipe(
        copy, tiny_folder, pairing={"length_balance": "none", "max_pairs_per_prompt": 1}
    )
    reports = run_alignment(recipe)
    assert work_done[:3] == [("round-1", stage) for stage in ("pairs", "reference", "train")]
    # Another model comes out of round 1: all of round 2 is another.
    rest = [name for _, name in work_done[3:]]
    again = [stage for stage in STAGES if stage != "prompts"]
    assert rest == [*ASKED, *again, "train", *ASKED]
    assert reports[1].pairs < finished[1][1].pairs
    assert reports[0] == finished[1][0]


@pytest.mark.slow
def test_it_goes_on_after_an_interruption_anywhere(finished, tiny_folder, tmp_path, monkeypatch):
    """Stopped at the start of every piece of work in turn, the result is the same."""
    output = tmp_path / "run"
    seen = set()

    class Stop(BaseException):
        pass

    def stop_once():
        doing = tuple((activity.name, activity.done) for activity in progress._activities)
        if doing not in seen:
            seen.add(doing)
            raise Stop

    monkeypatch.setattr(progress, "tell", stop_once)
    stops = 0
    while True:
        try:
            reports = run_alignment(make_recipe(output, tiny_folder))
            break
        except Stop:
            stops += 1
    assert stops == (ROUNDS + 1) * EVALUATION + ROUNDS * (len(STAGES) + 1)
    assert reports == finished[1]
    assert files(output) == files(finished[0])


def test_divide_loses_one_part_at_most(finished, copy, tiny_folder, monkeypatch):
    """What was divided before a kill is not divided again, and the table is that of one part."""
    (copy / "round-1" / "divide.json").unlink()
    monkeypatch.setattr(judge, "PROMPTS_PER_PART", 5)  # which makes three of four
    divided = []

    class Stopped(WordSplitter):
        def divide_one(self, response):
            divided.append(response)
            if len(divided) == 7 * SAMPLES:  # in the second part
                raise KeyboardInterrupt
            return super().divide_one(response)

    monkeypatch.setattr(judges, "make_splitter", lambda *args: (Stopped(), []))
    with pytest.raises(KeyboardInterrupt):
        run_alignment(make_recipe(copy, tiny_folder))
    assert len(list((copy / "round-1").glob("divide.parts-*/*.parquet"))) == 1
    run_alignment(make_recipe(copy, tiny_folder))
    assert len(divided) == (7 + PROMPTS - 4) * SAMPLES
    assert files(copy) == files(finished[0])


def test_no_pairs_says_what_became_of_them(copy, tiny_folder):
    recipe = make_recipe(copy, tiny_folder, pairing={"min_difference": 1000})
    with pytest.raises(MmpoError, match="round 1: no preference pair is left") as caught:
        run_alignment(recipe)
    counts = json.loads(re.search(r"\{.*\}", str(caught.value))[0])
    assert counts["responses"] == PROMPTS * SAMPLES
    assert counts["pairs"] == 0
    assert counts["pairs_small_difference"] > 0


@pytest.mark.parity
def test_the_model_loads_in_transformers(finished):
    torch = pytest.importorskip("torch")
    from transformers import LlavaForConditionalGeneration

    from mmpo_jax.data.processor import Processor
    from mmpo_jax.data.records import IMAGE, Turn
    from mmpo_jax.models.batch import Batch
    from mmpo_jax.models.head import next_token_logits

    folder = finished[0] / "model"
    model, params = load_model(folder)
    processor = Processor(folder, model.config)
    text = processor.render([Turn("user", (IMAGE, "what is in the picture ?"))], True)
    picture = ImageRef("picture", png_bytes(sample_scene("test", 0, 0)))
    layouts = processor.layouts([picture])
    ids = processor.expand_media(processor.encode(text), layouts, 1, [])
    ids = np.array([ids], np.int32)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((1, *processor.slot_shape)).astype(np.float32)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info["missing_keys"]), info
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(ids, dtype=torch.long), pixel_values=torch.tensor(pixels)
        ).logits[0, -1]
    absent = np.zeros((1, 1, 1), bool)
    batch = Batch(
        prompt_ids=ids,
        prompt_mask=np.ones_like(ids, bool),
        pixel_values=pixels[:, None],
        **tiny.reading_order(ids, [ids.shape[1]]),
        response_ids=absent.astype(np.int32),
        response_mask=absent,
        loss_mask=absent,
        weights=np.ones(1, np.float32),
    )

    @jax.jit
    def logits(params):
        module = model.bind(params)
        return next_token_logits(module, module.hidden_states(batch)[0])[0]

    np.testing.assert_allclose(logits(params), expected.numpy(), rtol=1e-3, atol=1e-3)


def test_stage_files_are_what_their_manifests_say(finished):
    for index in (1, 2):
        folder = finished[0] / f"round-{index}"
        for stage in STAGES:
            manifest = json.loads((folder / f"{stage}.json").read_text())
            assert manifest["sha256"] == fingerprint_file(folder / f"{stage}.parquet")
