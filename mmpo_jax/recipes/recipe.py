"""Recipes: an experiment as typed data.

Everything is checked when a recipe is loaded, before anything heavy starts; see `recipes.files`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import MeshSize, PositiveInt, Section, Seed
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.sources import FileData, LearnedFile
from mmpo_jax.models.config import HeadKind
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.registry import FIELDS
from mmpo_jax.picture_world.source import PictureWorldData
from mmpo_jax.recipes.candidates import (
    CandidateSources,
    DataCandidates,
    PolicyCandidates,
    check_order,
    check_sources,
    data_candidates,
)
from mmpo_jax.recipes.correction import Corrector, Layout, RuleCorrecting
from mmpo_jax.recipes.data import Data, Mixture
from mmpo_jax.recipes.evaluation import Benchmarks
from mmpo_jax.recipes.feedback import (
    ClaimsFeedback,
    Feedback,
    PairFeedback,
    ScoresFeedback,
    SourceFeedback,
)
from mmpo_jax.recipes.hub import Hub
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.sampling import Candidates, LongSampling, Sampling
from mmpo_jax.recipes.scoring import ImplicitReward, Rewarding, RewardModelAsked, Scoring
from mmpo_jax.recipes.sentences import Sentences
from mmpo_jax.recipes.serving import Serving
from mmpo_jax.recipes.training import RUNNING, Training


class Devices(Section):
    """Mesh sizes; -1 takes the devices the others leave. Where none is given, a training chooses
    them by its batch and its model."""

    data: MeshSize | None = None
    """By default the number of slices."""
    fsdp: MeshSize | None = None
    """By default what the others leave."""
    expert: MeshSize | None = None
    """Experts are split over it, and all else as over a larger `fsdp`. By default 1."""
    tensor: MeshSize | None = None
    """By default 1."""


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


class Base(Section):
    """What every recipe has."""

    seed: Seed = 0
    output: str
    """Folder everything is written to; running again goes on where it stopped. Where the result is
    one JSONL file, this may be its name."""
    model: str
    """Checkpoint folder, or one of an adapter in PEFT's format, which is merged into the model it
    names; `builtin:picture_world` is the checkpoint that ships with the package."""
    template: Literal["auto", "vicuna_v1"] = "auto"
    """How dialogues become text; `auto` is the checkpoint's own chat template. The one that
    LLaVA-1.5 has on the hub is not what it was trained with: `vicuna_v1` is, and RLAIF-V's choice.
    Results are saved with it."""
    devices: Devices = Devices()
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """What computes it; `auto` is splash attention on TPU, cuDNN on GPU, XLA elsewhere."""


class Validation(Section):
    """Rows that are held out of training and measured as it goes on."""

    data: Annotated[PictureWorldData | LearnedFile, Field(discriminator="source")] | None = None
    """Other data, or"""
    share: float | None = Field(None, gt=0, lt=1)
    """this much of the training data, all rows of one prompt on the same side."""
    every: PositiveInt = 100
    """Steps between measurements; one before the first step and one at the end besides."""
    metric: str = "eval_loss"
    """The result is the model of the step where it was best."""
    greater_is_better: bool = False
    patience: PositiveInt | None = None
    """Measurements without a better one after which training stops."""

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> Validation:
        if (self.data is None) == (self.share is None):
            raise ValueError("give either data or a share of the training data")
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


class TrainRecipe(Base):
    """`mmpo train`: one training stage on data that is there."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the config and the processor from the model folder."""
    reward_head: HeadKind | None = None
    """A new head that makes a reward model of a policy, of this type; a reward model goes on with
    the head that it has."""
    data: Mixture
    lengths: Lengths = Lengths()
    rollout: Rollout | None = None
    """Sampling and rewards, for objectives of sampled responses such as GRPO alone."""
    training: Training = Training()
    validation: Validation | None = None
    hub: Hub | None = None
    """Repository that the result is uploaded to; none by default."""
    evaluation: Benchmarks | None = None
    """What the model is measured by as it is trained; no step is chosen by them."""
    evaluate_every: PositiveInt | None = None
    """Steps between measurements by benchmarks, beside one before the first step and one at the
    end."""

    @pydantic.model_validator(mode="after")
    def _samples(self) -> TrainRecipe:
        kinds = {OBJECTIVES[section.type].kind == "rollouts" for section in self.training.objective}
        if len(kinds) > 1:
            raise ValueError("training.objective: some learn from samples, and some from data")
        if kinds != {self.rollout is not None}:
            raise ValueError(
                "rollout says how responses are sampled: a recipe has it if its objectives are of "
                "sampled responses (grpo, distillation, ...), and only then"
            )
        if self.rollout is None:
            return self
        if self.rollout.max_new_tokens > self.lengths.response[-1]:
            raise ValueError(
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} is more than training keeps "
                "of a response; give lengths.response a size of as many"
            )
        if self.training.save_every % self.rollout.steps:
            raise ValueError(
                "training.save_every must be a multiple of the steps of a rollout, "
                f"minibatches times num_iterations, {self.rollout.steps}"
            )
        self._check_rollout(self.rollout)
        return self

    def _check_rollout(self, rollout: Rollout) -> None:
        """Refuses objectives and rollouts that do not fit together."""
        needs = {section.type: section.term().needs for section in self.training.objective}
        rewarded = [name for name, need in needs.items() if "advantages" in need]
        if rewarded and not rollout.rewards:
            raise ValueError(f"rollout.rewards: {rewarded[0]} learns from rewards; give one")
        if rewarded and rollout.on_policy < 1:
            raise ValueError(
                f"rollout.on_policy: {rewarded[0]} learns from rewarded samples; leave it at 1"
            )
        if rollout.reward_models and self.training.teacher is not None:
            raise ValueError(
                "rollout.rewards: a reward model reads the prompt that a teacher is shown; take "
                "one of the two"
            )
        if rollout.reward_kl and self.training.reference.type not in RUNNING:
            raise ValueError(
                "rollout.reward_kl: needs a reference that runs in the step (reference: online or "
                "ema)"
            )
        for section in self.training.objective:
            if section.term().rows.other_image == "data":
                raise ValueError(
                    f"training.objective: {section.type}: prompts have no other image of the data; "
                    "take one that is made of the image"
                )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        if self.validation is not None and self.validation.every % self.training.log_every:
            raise ValueError("validation.every must be a multiple of training.log_every")
        if self.evaluate_every is not None and self.evaluation is None:
            raise ValueError("evaluate_every: `evaluation` names no benchmark")
        if self.evaluate_every is not None and self.evaluate_every % self.training.log_every:
            raise ValueError("evaluate_every must be a multiple of training.log_every")
        if self.evaluation is not None and self.reward_head is not None:
            raise ValueError("evaluation: a reward model answers no questions")
        if self.validation is not None and self.rollout is not None:
            raise ValueError(
                "validation: sampled responses are measured as they come; none held out"
            )
        types = {section.type for section in self.training.objective}
        of_world = any(isinstance(part, PictureWorldData) for part in self.data)
        if self.rollout is None and of_world and types != {"sft"}:
            raise ValueError(
                "training.objective: the picture world's dialogues hold no preferences; "
                "train on them with {type: sft}, or align"
            )
        return self


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

    @property
    def inference_dtype(self) -> str | None:
        """What the policy, splitters and labelers of all rounds compute in: bfloat16 where training
        does; None for the dtype of their weights, which those of trained ones are float32 in."""
        return None if self.training.compute_dtype == "float32" else self.training.compute_dtype

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


class GenerateRecipe(Base):
    """`mmpo generate`: responses to prompts, as JSONL."""

    data: Data
    lengths: Lengths | None = None
    """Bucket sizes; by default those that the data need."""
    sampling: LongSampling = LongSampling()


class ScoreRecipe(Base):
    """`mmpo score`: log-probs of responses, as JSONL."""

    data: Data
    lengths: Lengths | None = None
    """Bucket sizes; by default those that the data need, and nothing is cut."""
    scoring: Scoring = Scoring()


class RewardRecipe(Base):
    """`mmpo reward`: rewards of responses under a reward model, as JSONL."""

    data: FileData
    lengths: Lengths | None = None
    """Bucket sizes; by default those that the data need, and nothing is left out for its length."""
    rewarding: Rewarding = Rewarding()


class SelectRecipe(Base):
    """`mmpo select`: of several responses to a prompt the one with the best reward."""

    reference: str | None = None
    """Checkpoint that the policy, `model`, was trained from, for DPO's own reward; any name that
    `model` may have."""
    reward_model: RewardModelAsked | None = None
    """A reward model, in place of a reference."""
    data: Data
    """Prompts; rows with their responses where `sampling` is null."""
    lengths: Lengths | None = None
    """Bucket sizes; by default those that the data need, and nothing is cut."""
    sampling: Candidates | None = Candidates()
    """How the policy samples responses; null takes those of the data."""
    reward: ImplicitReward = ImplicitReward()
    batch_size: PositiveInt = 8
    """Prompts at a time, with all of their responses."""

    @pydantic.model_validator(mode="after")
    def _responses_fit(self) -> SelectRecipe:
        if self.lengths is None or self.sampling is None:
            return self
        if self.sampling.max_new_tokens > self.lengths.response[-1]:
            raise ValueError(
                f"sampling.max_new_tokens {self.sampling.max_new_tokens} is more than is scored of "
                "a response; give lengths.response a size of as many"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_reward(self) -> SelectRecipe:
        if (self.reference is None) == (self.reward_model is None):
            raise ValueError("give either reference, for DPO's own reward, or reward_model")
        return self

    @pydantic.model_validator(mode="after")
    def _has_responses(self) -> SelectRecipe:
        if self.sampling is None and isinstance(self.data, PictureWorldData):
            raise ValueError("sampling: null takes responses of the data; give a file of them")
        return self


class ServeRecipe(Section):
    """`mmpo serve`: a checkpoint behind OpenAI's chat protocol."""

    model: str
    """Checkpoint, by any name that `model` of other recipes may have."""
    template: Literal["auto", "vicuna_v1"] = "auto"
    """How dialogues become text."""
    devices: Devices = Devices()
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    serving: Serving = Serving()


class CorrectRecipe(Section):
    """`mmpo correct`: of pairs, what is wrong with the rejected responses, as questions and answers
    behind the chosen ones."""

    seed: Seed = 0
    output: str
    """JSONL file, or a folder, which gets `corrected.jsonl`."""
    data: FileData
    """Rows with chosen and rejected responses; of a ranking the best and the worst."""
    corrector: Corrector = RuleCorrecting()
    codebook: str | None = None
    """YAML file of the errors that are looked for; `correction/codebook.yaml` of the package by
    default."""
    max_errors: PositiveInt = 3
    """Errors of a response that are asked about, each by a question whose answer is yes and one
    whose answer is no."""
    layout: Layout = "dialogue"
    """Where the questions stand: `dialogue` behind the chosen response, as further turns; `apart`
    each as a dialogue of its own about the same images, which sees neither that response nor the
    other questions."""
    devices: Devices = Devices()
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Of a corrector that is a checkpoint."""


class EvaluateRecipe(Base):
    """`mmpo evaluate`: a model measured by benchmarks."""

    lengths: Lengths | None = None
    """Bucket sizes; by default, and where a question fits none, those that the questions need."""
    evaluation: Benchmarks
