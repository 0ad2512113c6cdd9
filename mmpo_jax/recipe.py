"""Recipes: an experiment as typed data.

Everything is checked when a recipe is loaded, before anything heavy starts; see `recipe_files`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from mmpo_jax.objectives.on_policy import Aggregation, Scale
from mmpo_jax.objectives.registry import FIELDS, HEADS, OBJECTIVES, REFERENCES, VIEWS
from mmpo_jax.recipe_objectives import SECTIONS, Objectives
from mmpo_jax.recipe_rewards import Rewards
from mmpo_jax.section import MeshSize, PositiveInt, Section, Seed


class Lengths(Section):
    """Static shapes: the ascending sizes that prompts and responses are padded to."""

    prompt: tuple[PositiveInt, ...] = (64,)
    response: tuple[PositiveInt, ...] = (64,)

    @pydantic.field_validator("prompt", "response")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or list(sizes) != sorted(set(sizes)):
            raise ValueError("give one or more sizes in ascending order")
        return sizes


class Devices(Section):
    """Mesh sizes; -1 takes the devices the others leave."""

    data: MeshSize = 1
    fsdp: MeshSize = -1
    tensor: MeshSize = 1


class ShapesData(Section):
    """Scenes of the built-in picture world."""

    source: Literal["shapes"] = "shapes"
    split: Literal["train", "align", "validation", "test"] = "train"
    size: PositiveInt = 1000
    seed: Seed = 0
    image_size: int = Field(48, ge=24)  # below, shapes could not be told apart
    questions: int = Field(3, ge=0)
    """Yes/no questions per scene in supervised data and in evaluation."""
    hallucination_rate: float = Field(0.5, ge=0, le=1)
    """Share of supervised captions with one invented thing."""


class FileData(Section):
    """JSONL or Parquet in TRL's conversational or plain format."""

    source: Literal["file"] = "file"
    path: str
    image_root: str | None = None
    """Folder the image paths are relative to and must stay in; the file's own by default."""
    max_skipped: float = Field(0.1, ge=0, le=1)
    """Share of unusable rows above which the run stops."""


Data = Annotated[ShapesData | FileData, Field(discriminator="source")]


class Sampling(Section):
    """How responses are drawn."""

    num_samples: PositiveInt = 10
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: PositiveInt = 64
    batch_size: PositiveInt = 16
    """Prompts at a time."""


class LongSampling(Sampling):
    """How responses of any kind are drawn: where nothing is known of them, room for a paragraph."""

    max_new_tokens: PositiveInt = 512


class Rollout(Section):
    """How an on-policy objective comes by its responses: sampled from the policy and rewarded."""

    rewards: Rewards
    """`weight` is how much one counts beside the others."""
    num_samples: PositiveInt = 8
    """Responses to every prompt of a batch."""
    temperature: float = Field(1.0, gt=0)
    """The loss is that of samples at 1."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: PositiveInt = 64
    updates_per_rollout: PositiveInt = 1
    """How many steps learn from the same responses."""
    scale: Scale = "group"
    """What a response's lead over the others is divided by: the standard deviation of its prompt's
    rewards, of the batch's, or nothing."""
    aggregation: Aggregation = "sum_then_normalize"
    """Of several rewards; `normalize_then_sum` is GDPO."""

    @pydantic.field_validator("rewards")
    @classmethod
    def _distinct(cls, rewards: Rewards) -> Rewards:
        types = [section.type for section in rewards]
        if len(set(types)) < len(types):
            raise ValueError("give each type once")
        return rewards


class Scoring(Section):
    """How responses are scored."""

    batch_size: PositiveInt = 8
    """Rows at a time."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is that of most weights, and float32 where that is float16: activations may pass its
    range, and bfloat16 would drop digits that the weights have."""
    tokens: bool = False
    """Writes the ids of prompts and responses too."""


class Feedback(Section):
    """Divide and conquer: how responses become claims and claims become verdicts."""

    splitter: Literal["shapes"] = "shapes"
    labeler: str | None = None
    """Checkpoint folder that answers the questions; the start model by default."""
    suffix: str = " Please answer yes or no."
    """Follows every question (RLAIF-V's wording)."""
    batch_size: PositiveInt = 16
    """Images at a time."""
    questions_at_once: PositiveInt = 16
    """Questions that share one encoding of their image."""


class Pairing(Section):
    """Combine: scored responses to preference pairs."""

    score: Literal["count", "fraction", "log_odds"] = "count"
    min_difference: float = Field(1.0, gt=0)
    max_pairs_per_prompt: PositiveInt = 2
    length_balance: Literal["rlaif_v", "symmetric", "none"] = "rlaif_v"
    duplicate_claims: Literal["keep", "drop_response"] = "keep"
    """What becomes of responses that make a claim twice; RLAIF-V's code in effect drops them."""

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Pairing:
        if self.score == "fraction" and self.min_difference > 1:
            raise ValueError("shares of accepted claims never differ by more than 1")
        return self


class CachedReference(Section):
    """The start model's log-probs, computed once before training and stored."""

    type: Literal["cached"] = "cached"


class GivenReference(Section):
    """Log-probs that the data hold."""

    type: Literal["given"] = "given"


class OnlineReference(Section):
    """The start model runs in the step. With adapters it shares the weights of the policy and has
    no adapters; without, it holds a copy of what is trained."""

    type: Literal["online"] = "online"


class MovingReference(Section):
    """A model in the step that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv
    2404.09656, soft updates; `mixup: 1` are hard ones)."""

    type: Literal["ema"] = "ema"
    every: PositiveInt = 512
    """Steps between updates."""
    mixup: float = Field(0.6, gt=0, le=1)
    """reference <- mixup * policy + (1 - mixup) * reference."""


class NoReference(Section):
    """For objectives that compare with none; others are refused."""

    type: Literal["none"] = "none"


Reference = Annotated[
    CachedReference | GivenReference | OnlineReference | MovingReference | NoReference,
    Field(discriminator="type"),
]


class Optimizer(Section):
    """AdamW with warm-up and cosine decay to zero."""

    learning_rate: float = Field(5e-7, gt=0)
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    """Not applied to biases and norms."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)


class Lora(Section):
    """Low-rank adapters, trained beside frozen weights."""

    target: str = "language_model/layers/.*"
    """Regular expression over whole paths of dense layers, such as
    `language_model/layers/self_attn/q_proj`; what `freeze` matches gets no adapter."""
    rank: PositiveInt = 16
    alpha: float = Field(32.0, gt=0)
    """Adapters count alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that training zeroes."""

    @pydantic.field_validator("target")
    @classmethod
    def _compiles(cls, target: str) -> str:
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return target


class Training(Section):
    """One training stage."""

    objective: Objectives = (SECTIONS["dpo"](type="dpo"),)
    """One, or a list whose weighted losses are added up; `mmpo objectives` lists them."""
    reference: Reference = CachedReference()
    """What objectives compare the policy with."""
    optimizer: Optimizer = Optimizer()
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    """Stops earlier than the epochs would; the schedule ends there too."""
    batch_size: PositiveInt = 8
    """Rows (pairs, dialogues groups) per update, over all devices."""
    micro_batch_size: PositiveInt | None = None
    """Rows at a time, over all devices; the whole batch by default."""
    freeze: tuple[str, ...] = ()
    """Regular expressions over whole parameter paths; what they match is not trained."""
    lora: Lora | None = None
    """Trains adapters instead of the weights."""
    remat: Literal["none", "dots", "full"] = "none"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    log_every: PositiveInt = 10
    save_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Training:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of {micro}")
        self._check_model()
        self._check_reference()
        if self.save_every % self.log_every:
            raise ValueError("save_every must be a multiple of log_every")
        return self

    def _check_model(self) -> None:
        for section in self.objective:
            lacking = section.term().needs & HEADS.keys()
            if lacking:
                raise ValueError(
                    f"objective: {section.type} needs {HEADS[min(lacking)]}, and none has one yet"
                )

    def _check_reference(self) -> None:
        enough = {
            "cached": {"reference", "reference_tokens"},
            "given": {"reference"},
            "none": set(),
        }.get(self.reference.type, REFERENCES.keys())
        for section in self.objective:
            needs = section.term().needs
            if self.reference.type == "given" and needs & VIEWS.keys():
                raise ValueError(
                    f"objective: {section.type} needs {VIEWS[min(needs & VIEWS.keys())]}, of which "
                    "the data give no log-probs; take `reference: {type: cached}`"
                )
            lacking = (needs & REFERENCES.keys()) - enough
            if lacking:
                need = max(lacking)
                raise ValueError(
                    f"objective: {section.type} needs {REFERENCES[need]}, which `reference: "
                    f"{{type: {self.reference.type}}}` does not give"
                )

    def identity(self) -> dict[str, Any]:
        """The options the trained weights depend on."""
        reporting = {"log_every", "save_every", "keep_checkpoints"}
        return self.model_dump(mode="json", exclude=reporting)


class PreferenceTraining(Training):
    """The training stage of an alignment round, which has pairs to learn from."""

    @pydantic.model_validator(mode="after")
    def _reads_pairs(self) -> PreferenceTraining:
        for section in self.objective:
            lacking = OBJECTIVES[section.type].needs & FIELDS.keys() - {"rank", "desirable"}
            if lacking:
                raise ValueError(f"objective: {section.type} needs {min(lacking)}; pairs have none")
        return self


class Evaluation(Section):
    """How the picture world's held-out scenes are captioned and questioned."""

    data: ShapesData = ShapesData(split="test", size=500, questions=8)
    batch_size: PositiveInt = 50
    max_new_tokens: PositiveInt = 64
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    """One sampled caption per scene and seed."""


class Base(Section):
    """What every recipe has."""

    seed: Seed = 0
    output: str
    """Folder everything is written to; running again goes on where it stopped. Where the result is
    one JSONL file, this may be its name."""
    model: str
    """Checkpoint folder, or one of an adapter in PEFT's format, which is merged into the model it
    names; `builtin:shapes` is the checkpoint that ships with the package."""
    template: Literal["auto", "vicuna_v1"] = "auto"
    """How dialogues become text; `auto` is the checkpoint's own chat template. The one that
    LLaVA-1.5 has on the hub is not what it was trained with: `vicuna_v1` is, and RLAIF-V's choice.
    Results are saved with it."""
    devices: Devices = Devices()
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """What computes it; `auto` is splash attention on TPU, cuDNN on GPU, XLA elsewhere."""


class TrainRecipe(Base):
    """`mmpo train`: one training stage on data that is there."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the config and the processor from the model folder."""
    data: Data
    lengths: Lengths = Lengths()
    rollout: Rollout | None = None
    """For objectives of sampled responses, such as GRPO, and for these alone."""
    training: Training = Training()

    @pydantic.model_validator(mode="after")
    def _samples(self) -> TrainRecipe:
        kinds = {OBJECTIVES[section.type].kind == "rollouts" for section in self.training.objective}
        if len(kinds) > 1:
            raise ValueError("training.objective: some learn from samples, and some from data")
        if kinds != {self.rollout is not None}:
            raise ValueError("rollout: objectives of sampled responses need it, and no others")
        if self.rollout is None:
            return self
        if self.rollout.max_new_tokens > self.lengths.response[-1]:
            raise ValueError(
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} is more than training keeps "
                "of a response; give lengths.response a size of as many"
            )
        if self.training.save_every % self.rollout.updates_per_rollout:
            raise ValueError("training.save_every must be a multiple of updates_per_rollout")
        return self

    @pydantic.model_validator(mode="after")
    def _has_pairs(self) -> TrainRecipe:
        types = {section.type for section in self.training.objective}
        if self.rollout is None and isinstance(self.data, ShapesData) and types != {"sft"}:
            raise ValueError(
                "training.objective: the picture world's dialogues hold no preferences; "
                "train on them with {type: sft}, or align"
            )
        return self


class AlignRecipe(Base):
    """`mmpo align`: rounds of generate, divide, conquer, combine, train."""

    data: Data
    lengths: Lengths = Lengths()
    rounds: PositiveInt = 4
    prompts_per_round: PositiveInt | None = None
    """Each round takes its own next prompts; all of the data by default."""
    sampling: Sampling = Sampling()
    feedback: Feedback = Feedback()
    pairing: Pairing = Pairing()
    training: PreferenceTraining = PreferenceTraining()
    evaluation: Evaluation | None = None

    @pydantic.model_validator(mode="after")
    def _responses_fit(self) -> AlignRecipe:
        if self.sampling.max_new_tokens > self.lengths.response[-1]:
            raise ValueError(
                f"sampling.max_new_tokens {self.sampling.max_new_tokens} is more than training "
                f"keeps of a response; give lengths.response a size of as many"
            )
        return self


class GenerateRecipe(Base):
    """`mmpo generate`: responses to prompts, as JSONL."""

    data: Data
    lengths: Lengths | None = None
    """By default as the data need."""
    sampling: LongSampling = LongSampling()


class ScoreRecipe(Base):
    """`mmpo score`: log-probs of responses, as JSONL."""

    data: Data
    lengths: Lengths | None = None
    """By default as the data need, and nothing is cut."""
    scoring: Scoring = Scoring()


class EvaluateRecipe(Base):
    """`mmpo evaluate`: hallucination and yes/no accuracy of a model."""

    lengths: Lengths = Lengths()
    evaluation: Evaluation = Evaluation()
