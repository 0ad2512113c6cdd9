"""`mmpo train`: which rows an objective learns from, and what makes a run another run."""

import io
import json
import logging
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.checkpoints.steps import CheckpointError
from mmpo_jax.commands.train import run_training, training_data
from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import read_table
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.skipped import SKIPPED_FILE
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.terms import needs
from mmpo_jax.recipes.train_recipe import TrainRecipe, Validation
from mmpo_jax.training.examples import make_examples
from mmpo_jax.training.losses import recipe_terms
from mmpo_jax.training.metrics import read_metrics

DPO, SFT = {"type": "dpo"}, {"type": "sft"}
QUESTION = "what is in the picture ?"
PREFERENCE = {"prompt": QUESTION, "chosen": "a red circle .", "rejected": "two blue stars ."}
DIALOGUE = {
    "messages": [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "a red circle ."},
        {"role": "user", "content": "is there a star ?"},
        {"role": "assistant", "content": "no"},
    ]
}
ALTERNATIVES = {"prompt": QUESTION, "responses": ["a red circle .", "two blue stars ."]}


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 40, 80)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make_recipe(tmp_path, tiny_folder):
    """A recipe over rows that all show one picture."""

    def make(rows, objective, model=tiny_folder, output="out", max_skipped=0.5, **training):
        (tmp_path / "picture.png").write_bytes(png(120))
        rows = [{"id": str(i), "images": ["picture.png"], **row} for i, row in enumerate(rows)]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "output": str(tmp_path / output),
            "model": str(model),
            "lengths": {"prompt": [24], "response": [24]},
            "data": {"source": "file", "path": str(path), "max_skipped": max_skipped},
            "training": {"objective": objective, "batch_size": 8, **training},
        }
        return TrainRecipe.model_validate(values)

    return make


def learned(recipe):
    """What the loss counts of each row: a text per response."""
    start = load_start(recipe.model)
    return [
        [start.processor.decode(r.ids[r.loss_mask].tolist()) for r in record.responses]
        for record in training_data(recipe, start).records
    ]


def test_supervision_takes_the_best_of_a_preference_and_all_turns_of_a_dialogue(make_recipe):
    recipe = make_recipe([PREFERENCE, DIALOGUE, ALTERNATIVES], SFT)
    best, dialogue, both = learned(recipe)
    assert best == ["a red circle ."]
    assert dialogue == ["a red circle . no"]
    assert both == ["a red circle .", "two blue stars ."]


RANKED = {
    "prompt": [{"role": "user", "content": QUESTION}],
    "responses": [
        {"turns": [{"role": "assistant", "content": text}], "rank": rank, "scores": {"score": s}}
        for text, rank, s in (("a red circle .", 1, 1), ("two blue stars .", 2, 5), ("no", 3, 0))
    ],
}


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        (["verified_sft"], [[1, 0, 0]]),
        (["rejection_sampling"], [[0, 1, 0]]),
        (["verified_sft", "sft"], [[1, 0, 0], [1, 0, 0]]),
        (["rejection_sampling", "sft"], [[0, 1, 0], [1, 0, 0]]),
    ],
)
def test_which_ranked_response_is_learned(make_recipe, objectives, expected):
    """By a verdict, by a score, by rank: each objective of a list by what it goes by."""
    recipe = make_recipe([RANKED] * 2, [{"type": name} for name in objectives])
    start = load_start(recipe.model)
    terms = recipe_terms(recipe.training)
    examples = make_examples(training_data(recipe, start).records, needs(terms))
    fields = {name: np.stack([e.fields[name] for e in examples]) for name in examples[0].fields}
    one = np.ones((2, 3, 1), np.float32)
    responses = Responses(jnp.asarray(-one), jnp.asarray(one > 0), fields=fields)
    for term, learned in zip(terms, expected, strict=True):
        _, counted = term.objective.function(responses, **term.options)
        np.testing.assert_array_equal(counted[0, :, 0], learned)


def test_dpo_takes_preferences_only(make_recipe, tmp_path):
    recipe = make_recipe([PREFERENCE, ALTERNATIVES, PREFERENCE], DPO)
    assert learned(recipe) == [["a red circle .", "two blue stars ."]] * 2
    (skipped,) = (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()
    assert json.loads(skipped)["reason"] == "incomplete_pair"
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        learned(make_recipe([DIALOGUE, ALTERNATIVES], DPO))


SAME = PREFERENCE | {"rejected": PREFERENCE["chosen"]}
LONG = {"prompt": QUESTION, "chosen": "red " * 30 + "circle .", "rejected": "red " * 30 + "star ."}


def ranked(texts, ranks):
    responses = [
        {"turns": [{"role": "assistant", "content": text}], "rank": rank}
        for text, rank in zip(texts, ranks, strict=True)
    ]
    return {"prompt": [{"role": "user", "content": QUESTION}], "responses": responses}


@pytest.mark.slow
def test_pairs_without_a_difference_are_left_out(make_recipe, tmp_path):
    """As they are, and as far as the bucket keeps them; a ranking needs one pair that differs."""
    same = ranked(["no", "no", "no"], [1, 2, 3])
    tied = ranked(["no", "no", "a red circle ."], [1, 2, 2])
    one_rank_differs = ranked(["no", "a red circle .", "no"], [1, 1, 2])
    rows = [PREFERENCE, SAME, LONG, same, tied, one_rank_differs]
    for objective, kept in ((DPO, 3), ({"type": "plackett_luce"}, 3), ([DPO, SFT], 3), (SFT, 6)):
        assert len(learned(make_recipe(rows, objective))) == kept
    learned(make_recipe(rows, DPO))
    found = [
        json.loads(line) for line in (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()
    ]
    assert [(row["id"], row["reason"]) for row in found] == [
        (id_, "same_responses") for id_ in ("1", "2", "3")
    ]
    assert ["largest bucket" in row["detail"] for row in found] == [False, True, False]
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used.*same_responses 2"):
        learned(make_recipe([SAME, LONG], DPO))


def test_equal_texts_are_learned_from_after_different_images(make_recipe, tmp_path):
    (tmp_path / "other.png").write_bytes(png(10))
    own = ranked(["a red circle .", "a red circle ."], [1, 2])
    own["responses"][1]["images"] = ["other.png"]
    assert len(learned(make_recipe([own, SAME], DPO))) == 1
    assert len(learned(make_recipe([SAME], {"type": "mdpo"}))) == 1  # its image is changed


def test_a_share_has_to_leave_rows_to_train_on(make_recipe):
    recipe = make_recipe([PREFERENCE] * 3, DPO)
    with pytest.raises(MmpoError, match="all 3 rows have one prompt"):
        run_training(recipe.model_copy(update={"validation": Validation(share=0.5)}))


def test_a_data_set_says_which_score_it_is(make_recipe):
    row = {"question": QUESTION, "models_output": ["a red circle .", "no"], "final_ranking": [1, 2]}
    row |= {"helpfulness": [4, 1], "ethical": [1, 2]}
    several = make_recipe([row, row | {"helpfulness": [None, 1]}, row], {"type": "mm_dpo"})
    with pytest.raises(DataError, match="no_score 3"):
        learned(several)
    chosen = [several.data[0].model_copy(update={"score": "helpfulness"})]
    recipe = several.model_copy(update={"data": tuple(chosen)})
    records = training_data(recipe, load_start(recipe.model)).records
    scores = [[response.source.scores["score"] for response in r.responses] for r in records]
    assert scores == [[4, 1]] * 2


@pytest.mark.slow
def test_a_mixed_up_image_is_in_no_pair(make_recipe):
    """Of MM-RLHF's pairs: another image for objectives that ask for one, nothing for others."""
    row = {"prompt": QUESTION, "chosen": "a red circle .", "rejected": "two blue stars ."}
    row |= {"mixed_up_image": "picture.png", "ls_factor": 0.5}
    for objective in (DPO, {"type": "mm_dpo"}, {"type": "mdpo", "image": "data"}):
        recipe = make_recipe([row, row], objective)
        assert learned(recipe) == [["a red circle .", "two blue stars ."]] * 2
        (record, _) = training_data(recipe, load_start(recipe.model)).records
        others = ["other_image"] if objective["type"] == "mdpo" else []
        assert [name for name, _ in record.others] == others


def test_ranks_count_and_not_the_order_of_responses(make_recipe, tmp_path):
    """Rows of MM-RLHF, whose responses come in any order, and one of KTO."""
    asked = {"question": QUESTION, "models_output": ["two blue stars .", "a red circle ."]}
    ranked, tied = asked | {"final_ranking": [2, 1]}, asked | {"final_ranking": [1, 1]}
    disliked = {"prompt": QUESTION, "completion": "two blue stars .", "label": False}
    liked = disliked | {"completion": "no", "label": True}
    rows = [ranked, ranked, tied, disliked]
    assert learned(make_recipe(rows, DPO)) == [["two blue stars .", "a red circle ."]] * 2
    found = [
        json.loads(line) for line in (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()
    ]
    assert [(row["row"], row["reason"]) for row in found] == [
        (3, "incomplete_pair"),
        (4, "undesirable"),
    ]
    assert learned(make_recipe([ranked, disliked, liked], SFT)) == [["a red circle ."], ["no"]]
    (found,) = (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()
    assert json.loads(found)["reason"] == "undesirable"


def test_no_row_skipped_any_more(make_recipe, tmp_path):
    learned(make_recipe([PREFERENCE, DIALOGUE], DPO))
    learned(make_recipe([PREFERENCE], DPO))
    assert not (tmp_path / "out" / SKIPPED_FILE).exists()


@pytest.mark.slow
def test_what_makes_it_another_run(make_recipe, tmp_path):
    rows = [PREFERENCE] * 8
    recipe = make_recipe(rows, DPO, max_steps=2, save_every=10)
    first = flatten(load_model(run_training(recipe))[1])

    reporting = {"save_every": 5, "log_every": 5, "keep_checkpoints": 1, "workers": 1}
    again = make_recipe(rows, DPO, max_steps=2, remat="full", **reporting)
    for path, leaf in flatten(load_model(run_training(again))[1]).items():
        np.testing.assert_array_equal(leaf, first[path])

    told = r"another model, data or recipe: training\.max_steps \(2 there, 1 here\); give"
    with pytest.raises(CheckpointError, match=told):
        run_training(make_recipe(rows, DPO, max_steps=1, save_every=10))
    (tmp_path / "picture.png").write_bytes(png(121))  # the rows' file is as it was
    with pytest.raises(CheckpointError, match=r"or recipe: data\.rows; give"):
        run_training(recipe)


def given(chosen, rejected=-9.0):
    """A row with these log-probs of the reference."""
    texts = (PREFERENCE["chosen"], chosen), (PREFERENCE["rejected"], rejected)
    responses = [
        {"turns": [{"role": "assistant", "content": text}], "rank": rank, "log_prob": log_prob}
        for rank, (text, log_prob) in enumerate(texts, start=1)
    ]
    return {"prompt": [{"role": "user", "content": QUESTION}], "responses": responses}


@pytest.mark.slow
def test_the_reference_is_of_the_rows_that_the_run_will_see(make_recipe, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [{**PREFERENCE, "chosen": f"{name} circle ."} for name in ("red", "blue", "green")] * 8
    rows[0] = LONG | {"rejected": "no"}
    for steps, seen in ((1, 8), (2, 16)):
        options = {"max_steps": steps, "log_every": 1, "save_every": 1}
        run_training(make_recipe(rows, DPO, output=f"out{steps}", **options))
        table = read_table(tmp_path / f"out{steps}" / "reference.parquet")
        assert table.num_rows == seen
        cut = int("0" in table["id"].to_pylist())
        told = f"{cut} of {2 * seen} responses trained on lost their tail to the largest bucket"
        assert caplog.messages[-1] == f"{told}, 24 tokens"
        first, *_ = read_metrics(tmp_path / f"out{steps}" / "metrics.jsonl")
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    fewer = read_table(tmp_path / "out1" / "reference.parquet")["id"].to_pylist()
    assert set(fewer) < set(table["id"].to_pylist())


@pytest.mark.slow
def test_given_log_probs_are_the_reference_and_make_the_run(make_recipe, tmp_path):
    reference = {"type": "given", "check": False}  # another model's
    options = {"max_steps": 1, "log_every": 1, "save_every": 1, "reference": reference}
    run_training(make_recipe([given(-5.0)] * 8, DPO, **options))
    (row,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    expected = 0.1 * ((row["logps/chosen"] + 5) - (row["logps/rejected"] + 9))
    assert row["rewards/margins"] == pytest.approx(expected, abs=1e-5)
    run_training(make_recipe([given(-5.0)] * 8, DPO, **options))
    with pytest.raises(CheckpointError, match=r"or recipe: data\.log-probs; give"):
        run_training(make_recipe([given(-6.0)] * 8, DPO, **options))


@pytest.mark.slow
def test_given_log_probs_of_another_model_stop_the_run(make_recipe, tmp_path):
    options = {"max_steps": 1, "log_every": 1, "save_every": 1, "reference": {"type": "given"}}
    with pytest.raises(DataError, match="cannot be those of") as caught:
        run_training(make_recipe([given(-5.0)] * 8, DPO, **options))
    found = re.search(r"row '0': -5.00, -9.00 in the data, (.*?), (.*?) of the", str(caught.value))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    chosen, rejected = map(float, found.groups())
    for noise, told in ((0.3, None), (-0.3, None), (10.0, "cannot be those of")):
        row = given(chosen + noise, rejected - noise)
        recipe = make_recipe([row] * 8, DPO, output=f"noise{noise}", **options)
        if told is None:
            run_training(recipe)
            options["reference"] = {"type": "given", "check": False}  # the same run
            run_training(make_recipe([row] * 8, DPO, output=f"noise{noise}", **options))
            options["reference"] = {"type": "given"}
            continue
        with pytest.raises(DataError, match=told):
            run_training(recipe)


@pytest.mark.slow
def test_sft_needs_no_reference_that_moves(make_recipe):
    options = {"max_steps": 1, "reference": {"type": "ema", "every": 1}}
    run_training(make_recipe([PREFERENCE] * 8, SFT, **options))


@pytest.mark.slow
def test_training_goes_on_from_a_run(make_recipe, tmp_path):
    run_training(make_recipe([PREFERENCE] * 8, SFT, output="first"))
    from_orbax = run_training(make_recipe([PREFERENCE] * 8, DPO, tmp_path / "first", "second"))
    from_folder = run_training(
        make_recipe([PREFERENCE] * 8, DPO, tmp_path / "first" / "model", "third")
    )
    theirs = flatten(load_model(from_folder)[1])
    for path, leaf in flatten(load_model(from_orbax)[1]).items():
        np.testing.assert_array_equal(leaf, theirs[path])


def test_no_prompt_of_a_mixture_is_trained_on_and_held_out(make_recipe, tmp_path, caplog):
    """Nor does a set with a single prompt end the run; it is on one side."""
    colours = ("red", "blue", "green", "yellow")
    rows = [{**PREFERENCE, "prompt": f"a {a} star {b} ?"} for a in colours for b in colours]
    values = make_recipe(rows, DPO).model_dump(mode="json")
    data = []
    for number, some in enumerate([rows, rows[5:15] * 2, *([row] for row in rows[:8])]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        data.append({"source": "file", "path": str(path)})
    recipe = TrainRecipe.model_validate(values | {"data": data, "validation": {"share": 0.5}})
    found = training_data(recipe, load_start(recipe.model))
    kept, held = ({r.prompt_ids.tobytes() for r in rows} for rows in (found.records, found.held))
    assert kept and held and not kept & held
    assert sum(part.size for part in found.parts) == len(found.records)
    told = [f"data.{n}: all of its rows are held out, and none is trained on" for n in range(2, 10)]
    gone = [message for message in told if message in caplog.messages]
    assert 0 < len(gone) < 8
    assert len(found.parts) == len(data) - len(gone)
