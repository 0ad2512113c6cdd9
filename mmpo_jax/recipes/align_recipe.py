"""The recipe of `mmpo align`."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.registry import FIELDS
from mmpo_jax.picture_world.source import PictureWorldData
from mmpo_jax.recipes.base import Base, Devices
from mmpo_jax.recipes.candidates import (
    CandidateSources,
    DataCandidates,
    PolicyCandidates,
    check_order,
    check_sources,
    data_candidates,
)
from mmpo_jax.recipes.data import Data
from mmpo_jax.recipes.evaluation import Benchmarks
from mmpo_jax.recipes.feedback import (
    ClaimsFeedback,
    Feedback,
    PairFeedback,
    ScoresFeedback,
    SourceFeedback,
)
from mmpo_jax.recipes.hub import Hub
from mmpo_jax.recipes.sampling import Sampling
from mmpo_jax.recipes.sentences import Sentences
from mmpo_jax.recipes.train_recipe import Validation
from mmpo_jax.recipes.training import Training


class Pairing(Section):
    """Scored responses to preference pairs."""

    min_difference: float = Field(1.0, gt=0)
    """Difference of scores from which on a pair is a preference, in what the judge counts."""
    max_pairs_per_prompt: PositiveInt = 2
    """Pairs of a prompt that are kept, drawn by the seed, so that no prompt outweighs others."""
    length_balance: Literal["rlaif_v", "symmetric", "none"] = "rlaif_v"
    """Which pairs are left out so that chosen and rejected responses are as long on average: with
    `rlaif_v` those whose chosen response is much shorter than the rejected one, with `symmetric`
    those where the side that is longer on average is much longer, with `none` no pairs."""
    chosen_from: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the `candidates` that chosen responses may come from; all by default."""
    rejected_from: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the `candidates` that rejected responses may come from; all by default."""


class PreferenceTraining(Training):
    """The training stage of an alignment round, which has pairs to learn from."""

    @pydantic.model_validator(mode="after")
    def _trains_policies(self) -> PreferenceTraining:
        for section in self.objective:
            if section.term().rows.scored is not None:
                raise ValueError(f"objective: {section.type} trains reward models, not policies")
        return self

    @pydantic.model_validator(mode="after")
    def _reads_pairs(self) -> PreferenceTraining:
        for section in self.objective:
            lacking = OBJECTIVES[section.type].needs & FIELDS.keys() - {
                "rank",
                "changed",
                "desirable",
            }
            if lacking:
                raise ValueError(f"objective: {section.type} needs {min(lacking)}; pairs have none")
            if section.term().rows.other_image == "data":
                raise ValueError(
                    f"objective: {section.type}: pairs have no other image of the data"
                )
        return self


class Selection(Section):
    """How the model of a run is chosen among those of its rounds: by prompts of the user's own that
    no round is trained on. Benchmarks choose nothing."""

    share: float = Field(0.05, gt=0, lt=1)
    """Share of the prompts that are held out, all rows of one prompt on the same side."""
    by: Literal["rejected_share", "score"] = "rejected_share"
    """What is best: the smallest share of claims that the labeler of `feedback` rejects, or the
    largest mean score of its judge."""
    num_samples: PositiveInt = 4
    """Responses to every held-out prompt, drawn as `sampling` says."""


class AlignRecipe(Base):
    """`mmpo align`: rounds of generate, judge, pair, train."""

    inference_devices: Devices | None = None
    """Mesh of sampling, judging and evaluation, where it is another than the training's: sampling
    wants whole weights on few devices (`tensor`), training many rows. By default `devices`."""
    data: Data
    lengths: Lengths = Lengths()
    rounds: PositiveInt = 4
    prompts_per_round: PositiveInt | None = None
    """Number of prompts, the next ones in every round; all of the data by default."""
    sampling: Sampling = Sampling()
    candidates: CandidateSources = (PolicyCandidates(),)
    """Where the responses come from that are judged together."""
    sentences: Sentences | None = None
    """Responses are sampled, judged and paired sentence by sentence; by default as a whole."""
    feedback: Feedback = ClaimsFeedback()
    pairing: Pairing = Pairing()
    training: PreferenceTraining = PreferenceTraining()
    validation: Validation | None = None
    """A share of a round's prompts whose pairs are held out of its training; the model of the round
    is that of the step where they were best, such as by `metric: eval_rewards/accuracies`, DPO's
    own reward."""
    selection: Selection | None = None
    """How the result is chosen among the rounds; by default it is the last one's."""
    evaluation: Benchmarks | None = None
    """What the start model and the model of every round are measured by."""
    hub: Hub | None = None
    """Repository that the result is uploaded to; none by default."""

    @pydantic.model_validator(mode="after")
    def _holds_out_pairs(self) -> AlignRecipe:
        if self.validation is None:
            return self
        if self.validation.data is not None:
            raise ValueError("validation.data: a round's pairs are its own; give share")
        if self.validation.every % self.training.log_every:
            raise ValueError("validation.every must be a multiple of training.log_every")
        return self

    @pydantic.model_validator(mode="after")
    def _selects_by_one_judge(self) -> AlignRecipe:
        if self.selection is None:
            return self
        claims = isinstance(self.feedback, ClaimsFeedback)
        if self.selection.by == "rejected_share" and not claims:
            raise ValueError(
                "selection.by: only feedback of type claims rejects any; take `by: score`"
            )
        if isinstance(self.feedback, SourceFeedback | ScoresFeedback | PairFeedback):
            raise ValueError(
                f"selection: feedback of type {self.feedback.type} says nothing of one model alone"
            )
        if self.sentences is not None:
            raise ValueError("selection: sentences are judged on the way, whole responses are not")
        return self

    @pydantic.model_validator(mode="after")
    def _responses_differ(self) -> AlignRecipe:
        check_sources(self.candidates, self.sampling)
        if data_candidates(self.candidates) and isinstance(self.data, PictureWorldData):
            raise ValueError(
                "candidates: data are responses that rows hold; the picture world's prompts have "
                "none, give a file"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _sentences_of_the_policy(self) -> AlignRecipe:
        others = [
            source.name for source in self.candidates if not isinstance(source, PolicyCandidates)
        ]
        if self.sentences is not None and others:
            raise ValueError(
                f"sentences: they are the policy's, and {others[0]} of the candidates is another "
                "source"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _knows_clean_sentences(self) -> AlignRecipe:
        counted = isinstance(self.feedback, ClaimsFeedback) and self.feedback.score == "count"
        given = self.sentences is None or "clean" in self.sentences.model_fields_set
        if not (counted or given):
            raise ValueError(
                "sentences.clean: give the score from which on a sentence is clean; 0 is that no "
                "claim was rejected, of feedback of type claims with `score: count` alone"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _sources_known(self) -> AlignRecipe:
        names = [source.name for source in self.candidates]
        sides = {
            "pairing.chosen_from": self.pairing.chosen_from,
            "pairing.rejected_from": self.pairing.rejected_from,
        }
        if isinstance(self.feedback, SourceFeedback):
            sides["feedback.order"] = self.feedback.order
        for key, given in sides.items():
            for name in given or ():
                if name not in names:
                    raise ValueError(
                        f"{key}: there is no source {name!r}; candidates: {', '.join(names)}"
                    )
        return self

    @pydantic.model_validator(mode="after")
    def _sides_differ(self) -> AlignRecipe:
        names = [source.name for source in self.candidates]
        chosen, rejected = (
            side or names for side in (self.pairing.chosen_from, self.pairing.rejected_from)
        )
        if isinstance(self.feedback, SourceFeedback):
            check_order(self.feedback.order, names, chosen, rejected, self.pairing.min_difference)
        if isinstance(self.feedback, ScoresFeedback):
            sides = {"candidates": names, "pairing.chosen_from": chosen}
            for key, side in (sides | {"pairing.rejected_from": rejected}).items():
                if "data" not in side:
                    raise ValueError(
                        f"{key}: feedback of type scores knows responses of the data alone; add "
                        "data"
                    )
        return self

    @pydantic.model_validator(mode="after")
    def _scores_differ(self) -> AlignRecipe:
        shares = isinstance(self.feedback, ClaimsFeedback) and self.feedback.score == "fraction"
        if shares and self.pairing.min_difference > 1:
            raise ValueError(
                "pairing.min_difference: shares of accepted claims never differ by more than 1"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _responses_fit(self) -> AlignRecipe:
        limit = self.lengths.response[-1]
        for source in self.candidates:
            if isinstance(source, DataCandidates):
                continue
            tokens = source.drawn(self.sampling).max_new_tokens
            if tokens > limit:
                own = tokens != self.sampling.max_new_tokens
                raise ValueError(
                    f"{f'candidates: {source.name}: ' if own else 'sampling.'}max_new_tokens "
                    f"{tokens} is more than training keeps of a response; give lengths.response a "
                    "size of as many"
                )
        return self

    @property
    def inference_dtype(self) -> str | None:
        """What the policy, splitters and labelers of all rounds compute in: bfloat16 where training
        does; None for the dtype of their weights, which those of trained ones are float32 in."""
        return None if self.training.compute_dtype == "float32" else self.training.compute_dtype
