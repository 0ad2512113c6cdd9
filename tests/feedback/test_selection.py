"""The choice among responses: ties, single ones, lengths; and which two models it compares."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.checkpoint import load_checkpoint, open_checkpoint
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record, Response, Turn
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.feedback import implicit
from mmpo_jax.feedback.implicit import (
    ImplicitRewards,
    check_same_tokenizer,
    reward_records,
    reward_stage,
    tokenizer_for_both,
)
from mmpo_jax.feedback.selection import best_of, describe_selection

ASKED = Record("a", (), (Turn("user", "is there a star ?"),), ())


def rewards(*pairs):
    """Of responses that are given as (sum, tokens)."""
    summed, counts = zip(*pairs, strict=True)
    return ImplicitRewards(np.array(summed, np.float64), np.array(counts, np.int32))


class TestChoice:
    def test_of_equal_rewards_the_first(self):
        assert best_of(np.array([0.1, 0.3, 0.3])) == 1
        assert best_of(np.zeros(4)) == 0
        assert best_of(np.array([-2.0])) == 0

    def test_lengths_of_both_choices(self):
        rows = [rewards((-1.0, 2), (-2.0, 8)), rewards((3.0, 3))]
        made = describe_selection(rows, [["a b", "a b c d"], ["x"]])
        assert (made.prompts, made.responses, made.different) == (2, 3, 1)
        # Of the first prompt the sum takes 2 tokens of 5 in the mean, the other reward 8.
        assert (made.per_token.tokens, made.per_token.words) == (1.5, 0.5)
        assert (made.summed.tokens, made.summed.words) == (-1.5, -0.5)
        assert (made.mean_tokens, made.mean_words) == (4.0, 2.0)
        assert made.to_json()["different_share"] == 0.5
        assert list(made.lines())[-1].endswith("to 1 of 2 prompts (50.0 %)")

    def test_responses_that_say_the_same_are_no_different_choice(self):
        made = describe_selection([rewards((-1.0, 2), (-1.5, 4))], [["yes", "yes"]])
        assert made.different == 0 and made.per_token.tokens == 1.0


class TestRewards:
    @pytest.fixture
    def both(self, tiny_folder, tmp_path, mesh):
        """(policy, reference, a record of equal and other responses)."""
        other = tiny.make_folder(tmp_path / "other", seed=1)
        policy, reference = (load_checkpoint(str(name), mesh) for name in (tiny_folder, other))
        texts = ("yes", "a red star", "yes", "no")
        record = dataclasses.replace(ASKED, responses=tuple(map(Response.of, texts)))
        made = tokenizer_for_both(reference.processor)(record, policy.processor, 64, 64)
        return policy, reference, made

    def test_equal_responses_have_equal_rewards(self, both, mesh, monkeypatch):
        """Also where the places of a batch are rounded otherwise."""
        score, noise = implicit.score_records, np.random.default_rng(0)
        monkeypatch.setattr(
            implicit,
            "score_records",
            lambda *args: [
                (np.array(row) + noise.normal(0, 1e-6, len(row))).tolist() for row in score(*args)
            ],
        )
        policy, reference, record = both
        options = {"beta": 0.1, "batch_size": 2, "compute_dtype": "float32"}
        (found,) = reward_records(policy, reference, [record], mesh, **options)
        assert found.summed[0] == found.summed[2] and len(set(found.summed.tolist())) == 3

    def test_one_model_at_a_time(self, both, mesh, tmp_path, monkeypatch):
        """As the function in memory has them, to rounding."""
        policy, reference, record = both
        options = {"beta": 0.1, "batch_size": 2, "compute_dtype": "float32"}
        (expected,) = reward_records(policy, reference, [record], mesh, **options)
        score, held = implicit.score_stage, []

        def counted(checkpoint, *args, **given):
            held.append((given["name"], len(flatten(policy.params))))
            return score(checkpoint, *args, **given)

        monkeypatch.setattr(implicit, "score_stage", counted)
        unread = open_checkpoint(reference.folder)
        assert unread.params == {} and unread.fingerprint == reference.fingerprint
        whole = len(flatten(policy.params))
        (found,) = reward_stage(
            policy, unread, [record], None, mesh, folder=str(tmp_path / "parts"), **options
        )
        assert held == [("policy", whole), ("reference", 0)]
        np.testing.assert_allclose(found.summed, expected.summed, rtol=1e-5)
        assert found.num_tokens.tolist() == [2, 4, 2, 2]


class TestRowsThatAreNoGood:
    def reject(self, processor, record):
        with pytest.raises(UnusableRow) as caught:
            tokenizer_for_both(processor)(record, processor, 64, 64)
        return caught.value.reason

    def test_images_in_responses(self, tiny_processor):
        shown = Response.of("yes", token_ids=(tiny.IMAGE_ID, tiny.EOS_ID))
        answered = dataclasses.replace(ASKED, responses=(shown,))
        # Decoded they say nothing, so these are tokens of the text, which has none.
        assert len(tokenizer_for_both(tiny_processor)(answered, tiny_processor, 64, 64).others) == 1
        shown = Response.of("", token_ids=(tiny.IMAGE_ID, tiny.EOS_ID))
        answered = dataclasses.replace(ASKED, responses=(shown,))
        assert self.reject(tiny_processor, answered) == "image_position"

    def test_no_prompt(self, tiny_processor):
        whole = Response((Turn("user", "a ?"), Turn("assistant", "yes")))
        assert self.reject(tiny_processor, Record("a", (), (), (whole,))) == "no_prompt"

    def test_beyond_the_positions_of_the_reference(self, tiny_processor, tmp_path, tiny_folder):
        short = shutil.copytree(tiny_folder, tmp_path / "short")
        config = json.loads((short / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = 12
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        config["text_config"]["rope_parameters"] = rope
        (short / "config.json").write_text(json.dumps(config))
        reference = Processor(short, load_config(short))
        function = tokenizer_for_both(reference)
        fits, long = (
            dataclasses.replace(ASKED, responses=(Response.of(text),))
            for text in ("yes", "a red star " * 4)
        )
        assert function(fits, tiny_processor, 64, 64).others
        with pytest.raises(UnusableRow, match="the reference's positions end at 12"):
            function(long, tiny_processor, 64, 64)


class TestTokenizers:
    @pytest.fixture
    def edited(self, tiny_folder, tiny_processor, tmp_path):
        """A processor with another tokenizer.json."""

        def edited(edit):
            folder = shutil.copytree(tiny_folder, tmp_path / "edited")
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            edit(tokenizer)
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
            return Processor(folder, tiny_processor.config)

        return edited

    def test_the_same_in_another_folder(self, edited, tiny_processor):
        check_same_tokenizer(tiny_processor, edited(lambda tokenizer: None))

    def test_where_it_would_cut_is_no_difference(self, edited, tiny_processor):
        truncation = {
            "direction": "Right",
            "max_length": 9,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        check_same_tokenizer(
            tiny_processor, edited(lambda tokenizer: tokenizer.update(truncation=truncation))
        )

    def test_two_words_that_changed_places(self, edited, tiny_processor):
        def swap(tokenizer):
            words = tokenizer["model"]["vocab"]
            words["red"], words["star"] = words["star"], words["red"]

        other = edited(swap)
        with pytest.raises(MmpoError) as caught:
            check_same_tokenizer(tiny_processor, other)
        told = str(caught.value)
        assert tiny_processor.folder in told and other.folder in told
        ids = tiny_processor.tokenizer.get_vocab()
        first = f"2 tokens have other ids, the first is 'red' with {ids['red']} and {ids['star']}"
        assert first in told

    def test_another_way_to_split(self, edited, tiny_processor):
        other = edited(lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}))
        with pytest.raises(MmpoError, match="split texts differently"):
            check_same_tokenizer(tiny_processor, other)
