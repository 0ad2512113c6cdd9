"""The responses of a round from several sources: what each gives, their order, and what is kept."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from helpers.live_arrays import first_steps
from helpers.small_rounds import make_recipe, prompts_of
from helpers.world_files import CHOSEN, REJECTED, write_pairs

from mmpo_jax.alignment import align
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.alignment.candidates import (
    Asked,
    check_candidates,
    load_prompts,
    responses_name,
    round_responses,
)
from mmpo_jax.alignment.pairs import pair_records, pair_rows
from mmpo_jax.checkpoints import checkpoint as checkpoint_module
from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import read_table
from mmpo_jax.core.stages import StageOutput
from mmpo_jax.data.contexts import OtherImage, changed_images
from mmpo_jax.data.hidden_tokens import hide_image
from mmpo_jax.feedback.given_judges import NO_SCORE, ScoresJudge, SourceJudge
from mmpo_jax.feedback.judge import Responses
from mmpo_jax.generation import responses as responses_module
from mmpo_jax.generation.responses import generate_responses
from mmpo_jax.recipes.feedback import ScoresFeedback, SourceFeedback

pytestmark = pytest.mark.usefixtures("stubs")

PROMPTS, SAMPLES = 7, 3
ROUND = {
    "rounds": 1,
    "prompts_per_round": None,
    "evaluation": None,
    "feedback": {"type": "picture_world_caption"},
}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), PROMPTS)


@pytest.fixture(scope="module")
def start(stubs, tiny_folder):
    return load_checkpoint(str(tiny_folder), align.make_mesh())


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """Other weights, and the same tokenizer."""
    return tiny.make_folder(tmp_path_factory.mktemp("other") / "llava", seed=5)


@pytest.fixture(scope="module")
def swapped_folder(other_folder):
    """The same weights with a tokenizer in which two words have each other's ids."""
    folder = shutil.copytree(other_folder, other_folder.parent / "swapped")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["red"], words["star"] = words["star"], words["red"]
    file.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def make(pairs_file, tiny_folder, tmp_path):
    """A recipe of one round on the pairs' prompts."""

    def make(*candidates, output="run", path=pairs_file, **changes):
        data = {"source": "file", "path": str(path)}
        changes = {**ROUND, "data": data, "candidates": list(candidates), **changes}
        return make_recipe(tmp_path / output, tiny_folder, **changes)

    return make


def asked_of(recipe, start, index=1) -> Asked:
    records, tokenized = prompts_of(recipe, start)
    mesh, folder = align.make_mesh(), f"{recipe.output}/round-{index}"
    return Asked(start, records, tokenized, recipe, mesh, folder, index)


def of_source(table, name):
    return [row for row in table.to_pylist() if row["source"] == name]


def generated_by(checkpoint, asked, records, seed=0, **decoding):
    """(text, ids) of what a model samples."""
    sampling = asked.recipe.sampling.model_copy(update=decoding)
    found = generate_responses(
        checkpoint, records, sampling, asked.recipe.lengths, asked.mesh, batch_size=12, seed=seed
    )
    return [(one.text, one.token_ids.tolist()) for one in found]


POLICY, GREEDY, DATA = {"type": "policy"}, {"type": "greedy"}, {"type": "data"}
EDITED = {"type": "edited_image", "edit": "black", "num_samples": 2}


def test_all_sources_stand_together_by_prompt(make, start):
    asked = asked_of(make(DATA, POLICY, GREEDY, EDITED), start)
    output = round_responses(asked)
    rows = output.table.to_pylist()
    sources = ["data"] * 2 + ["policy"] * SAMPLES + ["greedy"] + ["edited_image"] * 2
    ids = [record.id for record in asked.records]
    assert [row["prompt_id"] for row in rows] == [name for name in ids for _ in sources]
    assert [row["sample"] for row in rows] == list(range(len(sources))) * PROMPTS
    assert [row["source"] for row in rows] == sources * PROMPTS
    assert [row["text"] for row in of_source(output.table, "data")] == [CHOSEN, REJECTED] * PROMPTS
    assert {row["token_ids"] for row in of_source(output.table, "data")} == {None}
    assert responses_name(asked.recipe) == "responses"
    assert output.table.equals(read_table(f"{asked.folder}/responses.parquet"))


def test_the_policy_alone_is_what_it_samples_beside_others(make, start):
    """So a recipe that adds a source goes on from what was sampled."""
    alone = asked_of(make(POLICY, output="alone"), start)
    assert responses_name(alone.recipe) == "generate"
    output = round_responses(alone)
    assert output.table.column_names[-1] == "token_ids"
    several = asked_of(make(GREEDY, POLICY, output="several"), start)
    table = round_responses(several).table
    for name in ("generate.parquet", "generate.json"):
        before, after = (f"{asked.folder}/{name}" for asked in (alone, several))
        assert Path(before).read_bytes() == Path(after).read_bytes()
    ours = [(row["text"], row["token_ids"]) for row in of_source(table, "policy")]
    assert ours == [(row["text"], row["token_ids"]) for row in output.table.to_pylist()]


def test_a_greedy_response(make, start):
    asked = asked_of(make(POLICY, GREEDY), start)
    rows = of_source(round_responses(asked).table, "greedy")
    expected = generated_by(start, asked, asked.tokenized, num_samples=1, temperature=0.0)
    assert [(row["text"], row["token_ids"]) for row in rows] == expected


class TestEditedImage:
    def test_answers_to_what_is_changed(self, make, start):
        blank = {"type": "edited_image", "edit": "blank", "temperature": 0}
        asked = asked_of(make(POLICY, blank), start)
        rows = of_source(round_responses(asked).table, "edited_image")
        changed = [changed_images(record, OtherImage("blank")) for record in asked.tokenized]
        expected = generated_by(start, asked, changed, num_samples=1, temperature=0.0)
        assert [(row["text"], row["token_ids"]) for row in rows] == expected
        clean = generated_by(start, asked, asked.tokenized, num_samples=1, temperature=0.0)
        assert expected != clean

    def test_changes_of_their_own_in_every_round_and_source(self, make, start):
        noises = [
            {"type": "edited_image", "step": 800},
            {"type": "edited_image", "step": 800, "name": "again"},
        ]
        found = set()
        for index in (1, 2):
            asked = asked_of(make(*noises), start, index)
            round_responses(asked)
            for name in ("edited_image", "again"):
                manifest = json.loads(Path(asked.folder, f"generate-{name}.json").read_text())
                found.add(manifest["inputs"]["prompts"])
        assert len(found) == 4

    def test_every_sample_may_see_a_change_of_its_own(self, make, start):
        masked = {"type": "edited_image", "edit": "masked", "share": 0.75, "num_samples": 4}
        kept = {}
        for per_sample in (False, True):
            source = masked | {"per_sample": per_sample, "temperature": 1e-6}
            asked = asked_of(make(POLICY, source, output=str(per_sample)), start)
            told = []
            asked = dataclasses.replace(asked, finished=told.append)
            rows = of_source(round_responses(asked).table, "edited_image")
            kept[per_sample] = rows
            ids = [record.id for record in asked.records]
            assert [row["prompt_id"] for row in rows] == [name for name in ids for _ in range(4)]
            assert [row["sample"] for row in rows] == [3, 4, 5, 6] * PROMPTS
            assert {name for part in told for name in part["prompt_id"].to_pylist()} == set(ids)
        texts = {
            per_sample: [len({row["text"] for row in rows[at : at + 4]}) for at in range(0, 28, 4)]
            for per_sample, rows in kept.items()
        }
        # So cold that a text differs only with what is seen.
        assert texts[False] == [1] * PROMPTS and max(texts[True]) > 1

    def test_prompts_without_images_are_answered_by_the_others(self, make, start, tmp_path, caplog):
        path = write_pairs(tmp_path / "some", 5, blind=2)
        table = round_responses(asked_of(make(POLICY, EDITED, path=path), start)).table
        assert len(of_source(table, "policy")) == 5 * SAMPLES
        assert len(of_source(table, "edited_image")) == 3 * 2
        assert "edited_image is not asked 2 of 5 prompts" in caplog.text
        path = write_pairs(tmp_path / "none", 2, blind=2)
        with pytest.raises(DataError, match=r"edited_image is not asked 2 of 2 .*no_other_image"):
            round_responses(asked_of(make(POLICY, EDITED, output="none", path=path), start))


class TestHiddenImage:
    def test_answers_to_an_image_that_is_mostly_hidden(self, make, start):
        source = {"type": "hidden_image", "share": 1.0, "temperature": 0}
        asked = asked_of(make(POLICY, source), start)
        rows = of_source(round_responses(asked).table, "hidden_image")
        hidden = [hide_image(record, start.processor, 1.0, 0) for record in asked.tokenized]
        expected = generated_by(start, asked, hidden, num_samples=1, temperature=0.0)
        assert [(row["text"], row["token_ids"]) for row in rows] == expected
        # With nothing of the image left, equal questions have equal answers.
        answers = {record.prompt[0].text: set() for record in asked.records}
        for record, row in zip(asked.records, rows, strict=True):
            answers[record.prompt[0].text].add(row["text"])
        assert all(len(texts) == 1 for texts in answers.values())

    def test_other_tokens_in_every_round_are_other_prompts(self, make, start):
        found = set()
        for index in (1, 2):
            asked = asked_of(make(POLICY, {"type": "hidden_image", "share": 0.5}), start, index)
            round_responses(asked)
            manifest = json.loads(Path(asked.folder, "generate-hidden_image.json").read_text())
            found.add(manifest["inputs"]["prompts"])
        assert len(found) == 2


class TestCheckpoint:
    @pytest.fixture
    def other(self, other_folder):
        return {"type": "checkpoint", "model": str(other_folder), "num_samples": 2, "name": "other"}

    def test_its_own_samples_with_their_tokens(self, make, start, other, other_folder):
        asked = asked_of(make(POLICY, other | {"temperature": 0, "num_samples": 1}), start)
        rows = of_source(round_responses(asked).table, "other")
        theirs = load_checkpoint(str(other_folder), asked.mesh)
        expected = generated_by(theirs, asked, asked.tokenized, num_samples=1, temperature=0.0)
        assert [(row["text"], row["token_ids"]) for row in rows] == expected

    def test_texts_of_another_tokenizer(self, make, start, other, swapped_folder):
        """Their ids would be other words here."""
        asked = asked_of(make(other | {"model": str(swapped_folder)}, POLICY), start)
        table = round_responses(asked).table
        rows = of_source(table, "other")
        assert {row["token_ids"] for row in rows} == {None}
        words = [name for row in rows for name in row["text"].split() if name in ("red", "star")]
        assert words  # else the swap is not seen
        pairs = [
            {
                "prompt_id": row["prompt_id"],
                **{"chosen": row["text"], "chosen_sample": row["sample"]},
                **{"rejected": policy["text"], "rejected_sample": policy["sample"]},
            }
            for row, policy in zip(rows[::2], of_source(table, "policy")[::SAMPLES], strict=True)
        ]
        records = pair_records(asked.records, table, _Rows(pairs))
        by_id = dict(zip([record.id for record in records], pairs, strict=True))
        trained = pair_rows("pairs", records, start.processor, asked.recipe)
        assert len(trained) > 2
        for row in trained:
            chosen, rejected = (start.processor.decode(one.ids.tolist()) for one in row.responses)
            pair = by_id[row.id]
            assert (chosen, rejected) == (pair["chosen"], pair["rejected"])

    def test_it_is_read_only_where_something_is_left(self, make, start, other, monkeypatch):
        asked = asked_of(make(POLICY, other), start)
        first = round_responses(asked)
        monkeypatch.setattr(checkpoint_module, "load_weights", None)
        assert round_responses(asked).fingerprint == first.fingerprint

    def test_the_start_itself_is_not_read_again(self, make, start, tiny_folder, monkeypatch):
        monkeypatch.setattr(checkpoint_module, "load_weights", None)
        same = {"type": "checkpoint", "model": str(tiny_folder)}
        table = round_responses(asked_of(make(POLICY, same), start)).table
        texts = [[row["text"] for row in of_source(table, n)] for n in ("policy", "checkpoint")]
        assert texts[0] != texts[1]  # drawn independently

    def test_one_that_is_not_there(self, make, other, tmp_path):
        recipe = make(POLICY, other | {"model": str(tmp_path / "nowhere")})
        with pytest.raises(MmpoError, match="nowhere"):
            check_candidates(recipe)
        with pytest.raises(MmpoError, match="nowhere"):
            run_alignment(recipe)


class _Rows(list):
    """Rows as a table gives them."""

    def to_pylist(self):
        return self


def test_the_best_of_the_data(make, start):
    asked = asked_of(make({"type": "data", "responses": "best"}, GREEDY), start)
    rows = of_source(round_responses(asked).table, "data")
    assert [(row["sample"], row["text"]) for row in rows] == [(0, CHOSEN)] * PROMPTS


def test_data_without_responses(make, pairs_file, tmp_path):
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    asked = [{name: row[name] for name in ("id", "prompt")} for row in rows]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, asked)))
    with pytest.raises(DataError, match=r"data: no row of .*prompts\.jsonl has a response"):
        load_prompts(make(DATA, POLICY, path=path))


def test_a_kill_loses_a_part_of_one_source(make, start, monkeypatch):
    sources = POLICY, GREEDY, EDITED
    whole = round_responses(asked_of(make(*sources, output="whole"), start))
    asked = asked_of(make(*sources, output="killed"), start)
    monkeypatch.setattr(responses_module, "PROMPTS_PER_PART", 3)
    calls = []

    def counted(checkpoint, records, decoding, *args, **options):
        calls.append((len(records), decoding.num_samples))
        if len(calls) == 5:  # the second of the three parts of the greedy ones
            raise KeyboardInterrupt
        return original(checkpoint, records, decoding, *args, **options)

    original = responses_module.generate_responses
    monkeypatch.setattr(responses_module, "generate_responses", counted)
    with pytest.raises(KeyboardInterrupt):
        round_responses(asked)
    again = round_responses(asked)
    parts = [3, 3, PROMPTS - 6]
    policy, greedy, edited = ([(part, samples) for part in parts] for samples in (SAMPLES, 1, 2))
    assert calls == [*policy, *greedy[:2], *greedy[1:], *edited]
    assert again.fingerprint == whole.fingerprint


def test_what_is_finished_is_told_once_while_there_is_more_to_come(make, start, monkeypatch):
    monkeypatch.setattr(responses_module, "PROMPTS_PER_PART", 4)
    told = []

    def finished(rows):
        told.append((rows.num_rows, len(set(rows["prompt_id"].to_pylist()))))

    def asked(*sources):
        return dataclasses.replace(asked_of(make(*sources), start), finished=finished)

    data, policy, greedy = (2 * PROMPTS, PROMPTS), [(4 * SAMPLES, 4), (3 * SAMPLES, 3)], [(4, 4)]
    round_responses(asked(DATA, POLICY))
    assert told == [data, *policy]
    told.clear()
    round_responses(asked(DATA, POLICY))  # nothing is made, so nobody is to be asked meanwhile
    assert not told
    round_responses(asked(DATA, POLICY, GREEDY))
    assert sorted(told[:2]) == sorted([data, (PROMPTS * SAMPLES, PROMPTS)])
    assert told[2:] == [*greedy, (3, 3)]


class TestGivenJudges:
    @pytest.fixture
    def asked(self, make, start):
        """A round without its folder's files but the responses."""
        return asked_of(make(DATA, POLICY, GREEDY), start)

    def judged(self, judge, asked):
        judge.check(asked.records)
        output = judge.judge(Responses(asked.folder, asked.records, round_responses(asked)))
        assert isinstance(output, StageOutput)
        return output.table.to_pylist()

    def test_the_order_of_sources(self, asked):
        order = ("greedy", "data", "policy")
        rows = self.judged(SourceJudge(SourceFeedback(order=order)), asked)
        one = [1.0] * 2 + [0.0] * SAMPLES + [2.0]
        assert [row["score"] for row in rows] == one * PROMPTS
        assert json.loads(rows[0]["details"]) == {"source": "data"}

    def test_scores_of_the_data(self, asked):
        rows = self.judged(ScoresJudge(ScoresFeedback()), asked)
        scores = np.reshape([row["score"] for row in rows], (PROMPTS, -1))
        np.testing.assert_array_equal(scores[:, 0], 3.0 + np.arange(PROMPTS))
        np.testing.assert_array_equal(scores[:, 1], 1.0)
        assert np.isnan(scores[:, 2:]).all()
        assert [row["reason"] for row in rows[: 2 + SAMPLES + 1]] == [
            *[None] * 2,
            *[NO_SCORE] * (SAMPLES + 1),
        ]

    def test_ranks_of_the_data(self, asked):
        rows = self.judged(ScoresJudge(ScoresFeedback(by="rank")), asked)
        assert [row["score"] for row in rows[:2]] == [-1.0, -2.0]

    def test_other_scores_are_judged_again(self, asked):
        judge = ScoresJudge(ScoresFeedback())
        before = self.judged(judge, asked)
        first = asked.records[0]
        responses = tuple(dataclasses.replace(r, scores={"score": 9.0}) for r in first.responses)
        changed = [dataclasses.replace(first, responses=responses), *asked.records[1:]]
        after = self.judged(judge, dataclasses.replace(asked, records=changed))
        assert [row["score"] for row in after[:2]] == [9.0, 9.0]
        assert [row["score"] for row in after[6:8]] == [row["score"] for row in before[6:8]]

    def test_scores_that_nobody_gave(self, asked):
        told = "no response a score called 'honesty'; their scores: score"
        with pytest.raises(DataError, match=told):
            ScoresJudge(ScoresFeedback(name="honesty")).check(asked.records)


@pytest.fixture
def whole_round(make, other_folder):
    """A recipe whose pairs prefer the data to what the model says of a black image."""
    other = {"type": "checkpoint", "model": str(other_folder), "num_samples": 1}
    training = {
        "optimizer": {"learning_rate": 1e-3},
        "batch_size": 4,
        "max_steps": 2,
        "log_every": 1,
        "save_every": 2,
        "save_dtype": "bfloat16",
    }
    return make(
        {"type": "data", "responses": "best"},
        POLICY,
        EDITED,
        other,
        feedback={"type": "source", "order": ["data", "checkpoint", "policy", "edited_image"]},
        pairing={
            "length_balance": "none",
            "chosen_from": ["data", "checkpoint"],
            "rejected_from": ["edited_image"],
            "max_pairs_per_prompt": 20,
        },
        training=training,
    )


def test_a_round_from_its_sources_to_its_model(whole_round, caplog):
    with first_steps() as beside:
        (_, report) = run_alignment(whole_round)
    assert beside == [{}]  # the other model was let go of
    folder = Path(whole_round.output) / "round-1"
    table = read_table(f"{folder}/responses.parquet")
    source = {(row["prompt_id"], row["sample"]): row["source"] for row in table.to_pylist()}
    pairs = read_table(f"{folder}/pairs.parquet").to_pylist()
    sides = {
        side: {source[pair["prompt_id"], pair[f"{side}_sample"]] for pair in pairs}
        for side in ("chosen", "rejected")
    }
    assert sides == {"chosen": {"data", "checkpoint"}, "rejected": {"edited_image"}}
    assert {name for name, given in report.sources.items() if given["chosen"]} == sides["chosen"]
    assert sum(given["rejected"] for given in report.sources.values()) == len(pairs)
    counts = report.counts
    assert counts["pairs"] == report.pairs == len(pairs)
    skipped = set(re.findall(r"round 1: pairs: skipped row \d+, id (\S+):", caplog.text))
    assert report.trained == len(pairs) - len(skipped)
    assert counts["pairs_other_source"] == PROMPTS * 2 * SAMPLES + PROMPTS * SAMPLES * 2 + PROMPTS
    made = sum(
        counts[f"pairs_{name}"] for name in ("small_difference", "same_text", "other_source")
    )
    assert counts["pairs_all"] == made + counts["pairs"]
    assert "-- 0 of data: score 3" in (folder / "examples.txt").read_text()
    before = {name: (folder / name).read_text() for name in ("pairs.json", "train.json")}
    run_alignment(whole_round)
    for name, text in before.items():
        assert (folder / name).read_text() == text
