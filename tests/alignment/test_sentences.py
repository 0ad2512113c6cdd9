"""Rounds of sentences: what goes on from what, which pairs come of it, and what they train."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from helpers import tiny
from helpers.judged import prompt, responses_of
from helpers.small_rounds import PROMPTS, CoinLabeler, WordSplitter, make_recipe, prompts_of
from pydantic import ValidationError

from mmpo_jax.alignment import align
from mmpo_jax.alignment.align import load_prompts, run_alignment
from mmpo_jax.alignment.candidates import Asked
from mmpo_jax.alignment.pairs import pair_rows
from mmpo_jax.alignment.round import pair_records
from mmpo_jax.alignment.sentences import begun_records, continued_text, judged_sentences
from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.core.files import read_table
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Response, Turn
from mmpo_jax.data.tokenization import tokenize, tokenize_prompt
from mmpo_jax.feedback.claims import ClaimsJudge
from mmpo_jax.feedback.scores import accepted
from mmpo_jax.generation import responses as responses_module
from mmpo_jax.recipes.align_recipe import AlignRecipe

pytestmark = pytest.mark.usefixtures("stubs")

STEPS, SAMPLES = 3, 8
TWO_WORDS = r"\S+ \S+"
"""A random model makes no sentences: two words are one."""


def small_recipe(output, folder, **changes):
    return make_recipe(
        output,
        folder,
        **{
            "rounds": 1,
            "evaluation": None,
            "lengths": {"prompt": [24], "response": [16]},
            "sampling": {
                "num_samples": SAMPLES,
                "temperature": 1.0,
                "max_new_tokens": 6,
                "batch_size": 12,
            },
            "sentences": {"max_sentences": STEPS, "end": TWO_WORDS},
            "pairing": {"length_balance": "none", "max_pairs_per_prompt": 1000},
            "training": {
                "optimizer": {"learning_rate": 1e-3},
                "batch_size": 4,
                "max_steps": 2,
                "log_every": 1,
                "save_every": 2,
                "save_dtype": "bfloat16",  # which is measured on the last round's pairs
            },
            **changes,
        },
    )


@pytest.fixture(scope="module")
def done(stubs, tiny_folder, tmp_path_factory):
    """(recipe, folder of the round) of a whole alignment; do not write there."""
    recipe = small_recipe(tmp_path_factory.mktemp("sentences") / "run", tiny_folder)
    run_alignment(recipe)
    return recipe, f"{recipe.output}/round-1"


def table(folder, name):
    return read_table(f"{folder}/{name}.parquet").to_pylist()


def sentences_with_scores(folder):
    """Every sentence with its score, from the claims file: (beginning's id, row, score)."""
    for number in range(1, STEPS + 1):
        of_step = f"{folder}/sentence-{number}"
        claims = {(row["prompt_id"], row["sample"]): row for row in table(of_step, "divide")}
        answers = {
            (row["prompt_id"], row["question"]): accepted(row["p_yes"], row["p_no"])
            for row in table(of_step, "conquer")
        }
        for row in table(of_step, "sentences"):
            name = row["prompt_id"]
            asked = claims[name, row["sample"]]["questions"]
            verdicts = [answers[name, question] for question in asked]
            yield name, row, -verdicts.count(False) if verdicts else math.nan


def test_sentences_are_the_first_words_of_samples_each_but_once(done):
    _, folder = done
    for number in range(1, STEPS + 1):
        of_step = f"{folder}/sentence-{number}"
        generated = {(row["prompt_id"], row["sample"]): row for row in table(of_step, "generate")}
        cut = table(of_step, "sentences")
        said = [(row["prompt_id"], row["text"].strip()) for row in cut]
        assert len(set(said)) == len(said) > PROMPTS
        for row in cut:
            sample = generated[row["prompt_id"], row["sample"]]
            words = sample["text"].split()
            assert row["text"].split() == words[:2]
            assert row["finished"] == (sample["finished"] and len(words) <= 2)
            assert row["token_ids"] is None


def test_answers_go_on_from_clean_sentences(done):
    _, folder = done
    clean = {}
    for name, row, score in sentences_with_scores(folder):
        if score == 0 and not row["finished"]:
            clean.setdefault(name, []).append(row["begun"] + row["text"])
    for number in range(2, STEPS + 1):
        begun = {row["prompt_id"]: row["begun"] for row in table(folder, "responses")}
        longer = {name: text for name, text in begun.items() if name.endswith(f"-{number}")}
        assert longer
        for name, text in longer.items():
            before = name.replace(f"-{number}", f"-{number - 1}")
            assert text in clean[before]
            assert len(text.split()) == 2 * (number - 1)
        for name in begun:
            if name.endswith(f"-{number - 1}"):  # no clean one is left where it is
                assert (name in clean) == (name.replace(f"-{number - 1}", f"-{number}") in begun)


def test_pairs_are_recomputed_from_the_claims(done):
    """Of one beginning, a sentence without rejected claims against one with at least one."""
    _, folder = done
    groups = {}
    for name, row, score in sentences_with_scores(folder):
        groups.setdefault(name, []).append((row["sample"], row["text"], score))
    expected, too_low = set(), 0
    for name, rows in groups.items():
        for one, other in itertools.permutations(rows, 2):
            if one[2] - other[2] >= 1:
                if one[2] == 0:
                    expected.add((name, one[0], other[0], one[1], other[1]))
                else:
                    too_low += 1
    pairs = table(folder, "pairs")
    keys = ("prompt_id", "chosen_sample", "rejected_sample", "chosen", "rejected")
    assert {tuple(pair[key] for key in keys) for pair in pairs} == expected
    assert len(pairs) == len(expected) > STEPS
    assert len({pair["prompt_id"].rpartition("-")[2] for pair in pairs}) > 1
    metadata = read_table(f"{folder}/pairs.parquet").schema.metadata
    counts = json.loads(metadata[b"counts"])
    assert counts["pairs"] == len(pairs) and counts["pairs_chosen_too_low"] == too_low
    assert "begun" not in {key for pair in pairs for key in pair}


def test_only_the_sentences_are_trained(done, tiny_folder):
    recipe, folder = done
    start = load_checkpoint(str(tiny_folder), align.make_mesh())
    generated = read_table(f"{folder}/responses.parquet")
    pairs = read_table(f"{folder}/pairs.parquet")
    prompts = begun_records(load_prompts(recipe).records, generated)
    rows = pair_rows("pairs", pair_records(prompts, generated, pairs), start.processor, recipe)
    begun = {row["prompt_id"]: row["begun"] for row in generated.to_pylist()}
    finished = {(r["prompt_id"], r["sample"]): r["finished"] for r in generated.to_pylist()}
    by_id = {
        f"{pair['prompt_id']}/{pair['chosen_sample']}-{pair['rejected_sample']}": pair
        for pair in pairs.to_pylist()
    }
    assert {row.id for row in rows} == set(by_id)
    decode = start.processor.decode
    for row in rows:
        pair = by_id[row.id]
        said = begun[pair["prompt_id"]].split()
        words = decode(row.prompt_ids.tolist()).split()
        assert words[len(words) - len(said) :] == said
        for side, response in zip(("chosen", "rejected"), row.responses, strict=True):
            trained = response.ids[response.loss_mask].tolist()
            assert response.loss_mask.all()
            assert decode(trained).split() == pair[side].split()
            ended = trained[-1] in start.processor.eos_ids
            assert ended == finished[pair["prompt_id"], pair[f"{side}_sample"]]


def test_a_finished_round_samples_and_asks_nothing(done, tiny_folder, monkeypatch):
    recipe, folder = done
    before = {name: read_table(f"{folder}/{name}.parquet") for name in ("responses", "judge")}
    monkeypatch.setattr(responses_module, "generate_responses", None)
    monkeypatch.setattr(CoinLabeler, "answer", None)
    start = load_checkpoint(str(tiny_folder), align.make_mesh())
    generated, judged = judged_sentences(asked_of(recipe, start, folder), judge(), recipe.sentences)
    assert generated.table.equals(before["responses"]) and judged.table.equals(before["judge"])


def asked_of(recipe, start, folder):
    records, tokenized = prompts_of(recipe, start)
    shown = slice(0, recipe.prompts_per_round)
    return Asked(start, records[shown], tokenized[shown], recipe, align.make_mesh(), folder, 1)


def judge():
    return ClaimsJudge(make_feedback(), WordSplitter(), CoinLabeler, "coin")


def make_feedback():
    return AlignRecipe.model_validate(
        {"output": "o", "model": "m", "data": {"source": "file", "path": "p"}}
    ).feedback


def test_where_it_stopped_it_goes_on(done, tiny_folder, tmp_path, monkeypatch):
    """A judge that fails at the second sentence: the first ones are neither sampled nor asked."""
    recipe, folder = done
    start = load_checkpoint(str(tiny_folder), align.make_mesh())
    answer, calls = CoinLabeler.answer, []

    def fails(self, items):
        calls.append([name for name, _, _ in items])
        if calls[-1][0].endswith("-2") and len(calls) == 2:
            raise RuntimeError("killed")
        return answer(self, items)

    monkeypatch.setattr(CoinLabeler, "answer", fails)
    asked = asked_of(recipe, start, str(tmp_path / "round-1"))
    with pytest.raises(RuntimeError, match="killed"):
        judged_sentences(asked, judge(), recipe.sentences)
    generated, judged = judged_sentences(asked, judge(), recipe.sentences)
    numbers = [names[0].rpartition("-")[2] for names in calls]
    assert numbers == ["1", "2", *map(str, range(2, STEPS + 1))]
    for name, output in (("responses", generated), ("judge", judged)):
        assert output.table.equals(read_table(f"{folder}/{name}.parquet"))


def test_answers_whose_prompt_grows_too_long_end_there(tiny_folder, tmp_path, caplog):
    recipe = small_recipe(tmp_path, tiny_folder, lengths={"prompt": [16], "response": [16]})
    start = load_checkpoint(str(tiny_folder), align.make_mesh())
    generated, _ = judged_sentences(
        asked_of(recipe, start, str(tmp_path / "round-1")), judge(), recipe.sentences
    )
    prompts = begun_records(load_prompts(recipe).records, generated.table)
    lengths = [len(tokenize_prompt(one, start.processor, 10**6, 1).prompt_ids) for one in prompts]
    assert max(lengths) <= 16 and len(prompts) > PROMPTS
    assert "sentence 2: 4 answers end here" in caplog.text and "prompt_too_long" in caplog.text


def test_a_model_that_splits_is_told_what_was_said_before(tmp_path):
    asked = []

    class Listening(WordSplitter):
        def divide(self, items):
            asked.extend(items)
            return super().divide(items)

    responses = responses_of(tmp_path, {"p/sentence-2": [" It is red ."]}, records=[prompt("p")])
    begun = begun_records(responses.records, responses.generated.table)
    assert begun == responses.records  # no sentences
    (record,) = responses.records
    turns = (*record.prompt, Turn("assistant", "There is a dog."))
    record = dataclasses.replace(record, id="p/sentence-2", prompt=turns)
    listening = ClaimsJudge(make_feedback(), Listening(), CoinLabeler, "coin")
    listening.judge(dataclasses.replace(responses, records=[record]))
    (item,) = asked
    assert item.question == "what is in p ?\n(What was said before: There is a dog.)"
    assert item.response == " It is red ."


@pytest.mark.parametrize("make", [tiny.make_sentencepiece_folder, tiny.make_byte_level_folder])
def test_the_space_in_front_of_what_goes_on(make, tmp_path):
    """SentencePiece loses it where tokens are decoded alone."""
    folder = make(tmp_path / "llava")
    processor = Processor(folder, load_config(folder))
    shown = prompt("p")
    said, more = "a red star .", " a star"
    turns = (*shown.prompt, Turn("assistant", said))
    record = dataclasses.replace(shown, prompt=turns)
    begun = tokenize_prompt(record, processor, 10**6, 1)
    answered = dataclasses.replace(record, responses=(Response.of(more, finished=False),))
    (response,) = tokenize(answered, processor, 10**6, 10**6).responses
    ids = response.ids.tolist()
    assert continued_text(processor, begun.prompt_ids, ids) == more
    if make is tiny.make_sentencepiece_folder:
        assert processor.decode(ids) == more.strip()
    # And what is trained of the pair are those tokens, behind that prompt.
    whole = tokenize(answered, processor, 10**6, 10**6)
    np.testing.assert_array_equal(whole.prompt_ids, begun.prompt_ids)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"candidates": [{"type": "policy"}, {"type": "greedy"}]},
            "sentences: they are the policy's, and greedy of the candidates is another source",
        ),
        ({"sentences": {"end": "("}}, "no regular expression"),
        ({"sentences": {"end": "a*"}}, "found where nothing stands"),
        ({"sentences": {"max_sentences": 0}}, "greater than 0"),
        ({"feedback": {"score": "log_odds"}}, "sentences.clean: give the score"),
        ({"feedback": {"type": "picture_world_caption"}}, "sentences.clean: give the score"),
    ],
)
def test_recipes_that_make_no_sentences(changes, told):
    with pytest.raises(ValidationError, match=told):
        small_recipe("out", "DIR", **changes)


def test_any_score_may_be_clean_where_a_recipe_says_which():
    of_fractions = {"feedback": {"score": "fraction"}, "sentences": {"clean": 0.9}}
    recipe = small_recipe("out", "DIR", **of_fractions)
    again = AlignRecipe.model_validate(recipe.model_dump(mode="json"))
    assert again.sentences is not None and again.sentences.clean == 0.9
