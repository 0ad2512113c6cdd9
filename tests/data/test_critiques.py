"""Responses as a reward head reads them: where they end, what of them is learned, what is kept."""

import dataclasses

import numpy as np
import pytest
from helpers import tiny
from helpers.reward_heads import write_jsonl

from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.critiques import marker_mask, tokenize_scored
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.row_stage import tokenized_rows
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.sources import LearnedFile
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.objectives.registry import Scored
from mmpo_jax.objectives.terms import make_term, needs
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.training import NoReference
from mmpo_jax.training.examples import make_examples
from mmpo_jax.training.fields import maker_of
from mmpo_jax.training.row_use import LearnedUse

ASK = "is the star there ?"
WITH = Scored(ASK)
ANSWER = ("yes", ",", "there", "is", "</s>")
SAID = {"prompt": "a ?", "chosen": "a star", "rejected": "a ring"}
QUESTION = (Turn("user", "what is in the picture ?"),)
ASKED = (Turn("assistant", "a star"), Turn("user", "a ring ?"))


def record(*critiques, **fields):
    texts = ("a red star", "two blue rings", "a ring")
    image = ImageRef("0", png_bytes(sample_scene("test", 0, 0), 24))
    responses = tuple(
        Response.of(text, rank=rank, critique=critique, **fields)
        for rank, (text, critique) in enumerate(zip(texts, critiques, strict=False), start=1)
    )
    return Record("row", (image,), QUESTION, responses)


def words(processor, response, mask=None):
    ids = getattr(response, "ids", response)
    ids = ids if mask is None else ids[mask]
    return processor.tokenizer.convert_ids_to_tokens(ids.tolist())


def test_question_and_response_within_the_prompt(tiny_processor):
    """The layout of MM-RLHF's code: responses with critiques share no prompt, and the critique
    alone is learned; one without is read as ever."""
    within = Scored("is {response} there ? {question}", layout="one_turn")
    row = tokenize_scored(record("yes", None, "no"), tiny_processor, 99, 99, scored=within)
    contexts = [row, *(context for _, context in row.others)]
    prompts = [" ".join(words(tiny_processor, context.prompt_ids)) for context in contexts]
    asked = "what is in the picture ? ASSISTANT:"
    assert [prompt.partition("USER: ")[2].replace("<image> ", "") for prompt in prompts] == [
        f"is a red star there ? {asked}",
        asked,
        f"is a ring there ? {asked}",
    ]
    assert len({prompt.count("<image>") for prompt in prompts}) == 1
    read = [[len(one.ids) for one in context.responses] for context in contexts]
    assert read == [[2, 0, 0], [0, 4, 0], [0, 0, 2]]
    assert words(tiny_processor, contexts[2].responses[2]) == ["no", "</s>"]
    flags = [context.responses[n].criticised for n, context in enumerate(contexts)]
    assert flags == [True, False, True]
    np.testing.assert_array_equal(maker_of("critique")(row)[0][:2], [1, 1])
    np.testing.assert_array_equal(maker_of("critique")(row)[1], 0)
    several = dataclasses.replace(record("yes"), prompt=(*QUESTION, *ASKED))
    with pytest.raises(UnusableRow, match="holds one of each"):
        tokenize_scored(several, tiny_processor, 99, 99, scored=within)


def test_a_critique_is_the_last_answer_and_learned_alone(tiny_processor):
    row = tokenize_scored(record("yes , there is", None), tiny_processor, 99, 99, scored=WITH)
    first, second = row.responses
    whole = "a red star </s> USER: is the star there ? ASSISTANT: yes , there is </s>"
    assert " ".join(words(tiny_processor, first)) == whole
    assert words(tiny_processor, first, first.loss_mask) == [*ANSWER]
    assert words(tiny_processor, second) == ["two", "blue", "rings", "</s>"]
    assert words(tiny_processor, second, second.loss_mask) == ["</s>"]
    assert (first.criticised, second.criticised) == (True, False)
    critique = maker_of("critique")(row)
    np.testing.assert_array_equal(critique[0], first.loss_mask)
    assert not critique[1].any()


def test_the_prompt_is_that_of_the_policy(tiny_processor):
    """It is shared by all responses, whatever they are followed by."""
    asked = record("yes", "no", None)
    row = tokenize_scored(asked, tiny_processor, 99, 99, scored=WITH)
    plain = tokenize(asked, tiny_processor, 99, 99)
    np.testing.assert_array_equal(row.prompt_ids, plain.prompt_ids)
    for ours, theirs in zip(row.responses, plain.responses, strict=True):
        np.testing.assert_array_equal(ours.ids[: len(theirs.ids)], theirs.ids)


def test_markers_are_learned_where_they_are_asked_for(tiny_processor):
    scored = dataclasses.replace(WITH, markers=True)
    row = tokenize_scored(record("yes", None), tiny_processor, 99, 99, scored=scored)
    first, second = row.responses
    assert words(tiny_processor, first, first.loss_mask) == ["</s>", "yes", "</s>"]
    assert words(tiny_processor, second, second.loss_mask) == ["</s>"]


def test_white_space_behind_a_control_token_is_a_marker(tmp_path):
    folder = tiny.make_byte_level_folder(tmp_path / "bytes")
    processor = Processor(folder, load_model(folder)[0].config)
    ids = np.array(processor.encode("a</s>\na\n"))
    assert marker_mask(ids, processor).tolist() == [False, True, True, False, False]


def test_critiques_that_are_not_read(tiny_processor):
    """A scalar reward model does not see them, and an empty one is none."""
    for asked, scored in ((record("yes", "no"), Scored()), (record("", None), WITH)):
        row = tokenize_scored(asked, tiny_processor, 99, 99, scored=scored)
        assert [words(tiny_processor, r)[-1] for r in row.responses] == ["</s>"] * 2
        assert [len(r.ids) for r in row.responses] == [4, 4]
        assert [int(r.loss_mask.sum()) for r in row.responses] == [1, 1]


def test_what_generation_cut_ends_too(tiny_processor):
    cut = record(None, "yes", finished=False)
    row = tokenize_scored(cut, tiny_processor, 99, 99, scored=WITH)
    assert [words(tiny_processor, r)[-1] for r in row.responses] == ["</s>"] * 2


def test_one_that_would_lose_its_end_is_refused(tiny_processor):
    asked = record("yes , there is", None)
    (length, _) = (
        len(r.ids) for r in tokenize_scored(asked, tiny_processor, 99, 99, scored=WITH).responses
    )
    tokenize_scored(asked, tiny_processor, 99, length, scored=WITH)
    for limit in (length - 1, 3):
        with pytest.raises(UnusableRow, match=r"tokens with its critique, the limit is") as error:
            tokenize_scored(asked, tiny_processor, 99, limit, scored=WITH)
        assert error.value.reason == "response_too_long"


def test_rows_in_a_stage(tiny_processor, tmp_path):
    """What a run reads again is what it read: critiques in some rows and not in others, ties too,
    and rows of MM-RLHF's two files."""
    rows = [
        {
            "id": "a",
            "prompt": "a ?",
            "chosen": "a star",
            "rejected": "a ring",
            "chosen_reason": "yes",
        },
        {"id": "b", "prompt": "a ?", "chosen": "yes", "rejected": "no", "is_tie": True},
    ]
    rankings = {
        "id": "c",
        "question": "what ?",
        "models_output": ["a star", "a ring", "yes"],
        "final_ranking": [1, 3, 2],
        "score_reasons": ["yes", None, "no"],
    }
    use = LearnedUse.of(
        [make_term("bradley_terry"), make_term("critique", prompt=ASK)], NoReference()
    )
    found = {}
    for name, given in (("pairs", rows), ("rankings", [rankings])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", given)
        for _ in range(2):  # made, then read
            found[name] = tokenized_rows(
                LearnedFile(path=str(path)),
                use,
                tiny_processor,
                Lengths(prompt=(32,), response=(32,)),
                folder=str(tmp_path / "out"),
                name=name,
                skipped_file=str(tmp_path / "skipped.jsonl"),
                workers=1,
            )
            criticised = [[r.criticised for r in row.responses] for row in found[name]]
            if name == "pairs":
                assert criticised == [[True, False], [False, False]]
    assert criticised == [[True, False, True]]
    examples = make_examples(
        found["pairs"], needs([make_term("bradley_terry"), make_term("critique")])
    )
    assert [e.fields["ranks"].tolist() for e in examples] == [[1, 2], [1, 1]]
    assert examples[0].fields["critique"].sum() == 2  # yes, EOS
    with pytest.raises(
        DataError, match="no row has the field 'critique', which the objective needs"
    ):
        make_examples(found["pairs"][1:], needs([make_term("critique")]))
