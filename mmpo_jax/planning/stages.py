"""What a recipe runs, stage by stage: which programs, and how often each."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.data.batching import bucket, fitting_sizes
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.feedback import self_reward, split_prompts
from mmpo_jax.feedback.labeler import QUESTIONS_AT_ONCE, USUAL_QUESTIONS
from mmpo_jax.generation.responses import PROMPTS_PER_PART
from mmpo_jax.models.family import Size
from mmpo_jax.objectives.terms import needs, rows_read
from mmpo_jax.parallel.mesh import batch_shards
from mmpo_jax.picture_world.source import PictureWorldData
from mmpo_jax.planning.abstract import Sizes
from mmpo_jax.planning.opened import Opened, open_config
from mmpo_jax.planning.programs import (
    Program,
    Sampled,
    generating,
    labelling,
    scoring,
    training,
    validation,
)
from mmpo_jax.recipes.candidates import (
    CheckpointCandidates,
    EditedImageCandidates,
    GreedyCandidates,
    PolicyCandidates,
)
from mmpo_jax.recipes.feedback import (
    CheckpointAsked,
    CheckpointLabeling,
    CheckpointSplitting,
    ClaimsFeedback,
    ImplicitFeedback,
    SelfRewardFeedback,
)
from mmpo_jax.recipes.recipe import (
    AlignRecipe,
    Base,
    GenerateRecipe,
    ScoreRecipe,
    SelectRecipe,
    TrainRecipe,
)
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.losses import needs_reference, recipe_terms
from mmpo_jax.training.on_policy import with_token_limit
from mmpo_jax.training.plan import check_training, micro_batch_size, total_steps

TEXT_TOKENS = 64
"""Of a prompt's text, where no recipe gives bucket sizes."""


SPEED = {"micro_batch_size": None, "remat": "none"}
"""Options of a training that its parameters have nothing to do with."""


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What no recipe and no config says."""

    rows: int | None = None
    """Rows of the data; None for those that are found."""
    claims: float = 8.0
    """Claims of a response."""
    question_tokens: int = 32
    """Of a question about a claim, or of a claim with its question in a splitter's reply."""
    responses: int = 2
    """Responses of a record that training or scoring reads."""
    image: Size | None = None
    """Height and width of a prompt's picture; None for `opened.USUAL_IMAGE`."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A program and how often the whole recipe runs it."""

    stage: str
    program: Program
    runs: float | None
    """None where the number of rows is not known. Of a decoding one, in whole loops."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a recipe runs on a mesh."""

    runs: tuple[Run, ...]
    notes: tuple[str, ...]
    """What was assumed or left out, for people."""


class Stages:
    """Makes the stages of a recipe on one mesh."""

    def __init__(self, recipe: Base, mesh: Mesh, assumed: Assumed):
        """
        Args:
          recipe: of any command that runs one.
          mesh: the devices.
          assumed: what it does not say.
        """
        self.recipe, self.mesh, self.assumed = recipe, mesh, assumed
        self.shards = batch_shards(mesh)
        self.notes: list[str] = []
        self.runs: list[Run] = []

    def plan(self) -> Plan:
        """
        Raises:
          MmpoError: the recipe cannot be run on the mesh, or there is nothing to plan.
        """
        kinds: dict[type, Callable[[Any], None]] = {
            TrainRecipe: self._train,
            AlignRecipe: self._align,
            GenerateRecipe: self._generate,
            ScoreRecipe: self._score,
            SelectRecipe: self._select,
        }
        kinds[type(self.recipe)](self.recipe)
        return Plan(tuple(self.runs), tuple(dict.fromkeys(self.notes)))

    def add(self, stage: str, programs: Sequence[Program], runs: Sequence[float | None]) -> None:
        self.runs += [
            Run(stage, program, count) for program, count in zip(programs, runs, strict=True)
        ]

    def _train(self, recipe: TrainRecipe) -> None:
        opened = self._open(recipe.model, recipe.template)
        rows = [self._rows(data) for data in recipe.data]
        parts = [
            MixtureEntry(count, data.weight)
            for count, data in zip(rows, recipe.data, strict=True)
            if count is not None
        ]
        config, rollout = recipe.training, recipe.rollout
        if rollout is not None:
            config = with_token_limit(config, rollout)
        updates = rollout.updates_per_rollout if rollout else 1
        known = len(parts) == len(rows)
        steps = total_steps(config, parts, updates) if known else config.max_steps
        records = sum(part.size for part in parts) if known else None
        responses = self.assumed.responses
        if rollout is not None:
            responses = rollout.num_samples
            sizes = self._sizes(opened, recipe.lengths, responses)
            draws = None if steps is None else steps / updates
            sampled = Sampled(
                config.batch_size,
                config.batch_size,
                Decoding(**rollout.model_dump(include=set(Decoding.model_fields))),
            )
            policy = opened.with_dtype(config.compute_dtype)
            self._sample("rollouts", policy, sizes, sampled, config.batch_size, draws)
        sizes = self._sizes(opened, recipe.lengths, responses)
        self._training(opened, config, sizes, steps, records, rollout)
        if recipe.validation is not None:
            held = recipe.validation.share
            batches = None
            if held is not None and records is not None and steps is not None:
                times = steps // recipe.validation.every + 2
                batches = times * math.ceil(held * records / config.batch_size)
            program = validation(opened, self.mesh, config, sizes)
            self.add("validation", [program], [batches])

    def _training(
        self,
        opened: Opened,
        config: Training,
        sizes: Sizes,
        steps: float | None,
        records: float | None,
        rollout: Any = None,
    ) -> None:
        micro_batch_size(config, self.mesh)
        _check_once(
            config.model_copy(update=SPEED | {"batch_size": self.shards}), opened, self.mesh
        )
        terms = recipe_terms(config)
        if rows_read(terms).mismatched:
            sizes = dataclasses.replace(sizes, responses=2 * sizes.responses)
        if needs_reference(terms) and config.reference.type == "cached" and rollout is None:
            rows = self._rounded(config.batch_size)
            per_token = "reference_tokens" in needs(terms)
            of_reference = dataclasses.replace(sizes, rows=rows)
            program = scoring(
                "reference", opened, self.mesh, of_reference, config.compute_dtype, per_token
            )
            self.add("reference", [program], [_batches(records, rows)])
        step = training(opened, self.mesh, config, sizes, rollout)
        self.add("training", [step], [steps])

    def _align(self, recipe: AlignRecipe) -> None:
        start = self._open(recipe.model, recipe.template)
        opened = start
        if recipe.rounds > 1 and start.dtype.name != "float32":
            opened = start.with_dtype("float32")
            self.notes.append(
                "rounds after the first start from float32 weights, which all rounds are planned "
                f"with; the first has {start.dtype.name}"
            )
        rounds = recipe.rounds
        prompts = recipe.prompts_per_round
        if prompts is None:
            prompts = self._rows(recipe.data)
        sizes = self._sizes(opened, recipe.lengths, 2)
        responses = 0.0
        for source in recipe.candidates:
            if not isinstance(
                source,
                PolicyCandidates | GreedyCandidates | EditedImageCandidates | CheckpointCandidates,
            ):
                self.notes.append(f"candidates: {source.name} takes no program of ours")
                continue
            drawn = source.drawn(recipe.sampling)
            own = opened
            if isinstance(source, CheckpointCandidates):
                own = self._open(source.model, source.template)
            responses += drawn.num_samples
            sampled = Sampled(PROMPTS_PER_PART, drawn.batch_size, drawn)
            name = "generation" if isinstance(source, PolicyCandidates) else source.name
            self._sample(name, own, sizes, sampled, prompts, rounds)
        self._judge(recipe, start, prompts, responses)
        pairs = None if prompts is None else prompts * recipe.pairing.max_pairs_per_prompt
        config = recipe.training
        steps = None if pairs is None else total_steps(config, [MixtureEntry(pairs)])
        if steps is None:
            steps = config.max_steps
        if pairs is not None:
            self.notes.append(
                f"every prompt has {recipe.pairing.max_pairs_per_prompt} pairs, as many as allowed"
            )
        total = None if steps is None else steps * rounds
        self._training(opened, config, sizes, total, None if pairs is None else pairs * rounds)

    def _judge(
        self, recipe: AlignRecipe, opened: Opened, prompts: int | None, responses: float
    ) -> None:
        feedback, rounds = recipe.feedback, recipe.rounds
        count = None if prompts is None else prompts * responses * rounds
        if isinstance(feedback, ImplicitFeedback):
            for name in (feedback.policy, feedback.reference):
                judge = self._open(name, recipe.template)
                dtype = judge.inference_dtype.name
                if feedback.compute_dtype != "auto":
                    dtype = feedback.compute_dtype
                rows = self._rounded(feedback.batch_size)
                sizes = self._sizes(judge, recipe.lengths, int(responses))
                sizes = dataclasses.replace(sizes, rows=rows)
                program = scoring("implicit reward", judge, self.mesh, sizes, dtype)
                batches = None if prompts is None else prompts * rounds / rows
                self.add("judging", [program], [batches])
        elif isinstance(feedback, SelfRewardFeedback):
            if not isinstance(feedback.labeler, CheckpointAsked):
                self.notes.append("feedback.labeler is a server, which is not planned")
                return
            judge = self._asked(feedback.labeler, recipe, opened)
            text = feedback.prompt or self_reward.PROMPT
            answer = recipe.sampling.max_new_tokens
            self._speak("judging", judge, feedback.labeler, feedback, text, answer, count)
        elif isinstance(feedback, ClaimsFeedback):
            self._split(recipe, feedback, opened, count)
            if not isinstance(feedback.labeler, CheckpointLabeling):
                self.notes.append("feedback.labeler is a server, which is not planned")
                return
            judge = self._asked(feedback.labeler, recipe, opened)
            self._label(feedback.labeler, judge, prompts, responses, rounds)
        else:
            self.notes.append(f"feedback of type {feedback.type} takes no program of ours")

    def _split(
        self, recipe: AlignRecipe, feedback: ClaimsFeedback, opened: Opened, count: float | None
    ) -> None:
        splitter = feedback.splitter
        if not isinstance(splitter, CheckpointSplitting):
            self.notes.append(f"feedback.splitter of type {splitter.type} takes no program of ours")
            return
        answer = recipe.sampling.max_new_tokens
        asked = self._asked(splitter, recipe, opened)
        if splitter.style == "json":
            text = splitter.prompt or split_prompts.CLAIMS_PROMPT
            self._speak("splitting", asked, splitter, splitter, text, answer, count)
            return
        text = splitter.prompt or split_prompts.FACTS_PROMPT
        self._speak("splitting", asked, splitter, splitter, text, answer, count)
        second = asked
        if splitter.question_model is not None:
            second = self._open(splitter.question_model, splitter.template)
        text = splitter.question_prompt or split_prompts.QUESTIONS_PROMPT
        facts = round(self.assumed.claims * self.assumed.question_tokens)
        self._speak("questions", second, splitter, splitter, text, facts, count)

    def _speak(
        self,
        stage: str,
        opened: Opened,
        asked: CheckpointAsked,
        speaking: Any,
        text: str,
        told: int,
        count: float | None,
    ) -> None:
        """A text model that is asked once for every response, with so many tokens of it."""
        processor = opened.processor
        picture = (
            opened if stage == "judging" else dataclasses.replace(opened, picture_tokens=0, slots=0)
        )
        tokens = picture.picture_tokens + len(processor.encode(text)) + TEXT_TOKENS + told
        (prompt,) = fitting_sizes([tokens], 4)
        decoding = Decoding(
            temperature=speaking.temperature,
            top_p=speaking.top_p,
            max_new_tokens=speaking.max_new_tokens,
        )
        sampled = Sampled(PROMPTS_PER_PART * 10, asked.batch_size, decoding)
        sizes = Sizes(1, prompt, slots=picture.slots)
        self.notes.append("replies of text models are planned as long as their limit, asked once")
        self._sample(stage, opened, sizes, sampled, count, 1)

    def _label(
        self,
        labeling: CheckpointLabeling,
        opened: Opened,
        prompts: int | None,
        responses: float,
        rounds: int,
    ) -> None:
        """RLAIF-V's labeler, with the questions of a prompt's responses behind its image."""
        assumed = self.assumed
        questions = max(1, math.ceil(responses * assumed.claims))
        at_once = min(questions, QUESTIONS_AT_ONCE)
        (count,) = fitting_sizes([at_once], 2)
        (prompt,) = fitting_sizes([opened.picture_tokens + TEXT_TOKENS], 4)
        (question,) = fitting_sizes([assumed.question_tokens], 2)
        rows = self._rounded(labeling.batch_size)
        budget = rows * (prompt + min(count, USUAL_QUESTIONS) * question)
        fitting = budget // (prompt + count * question) // self.shards * self.shards
        sizes = Sizes(max(self.shards, fitting), prompt, count, question, opened.slots)
        program = labelling(opened, self.mesh, sizes)
        self.notes.append(
            f"a response makes {assumed.claims:g} claims, each asked about by "
            f"{assumed.question_tokens} tokens"
        )
        batches = None
        if prompts is not None:
            parts = math.ceil(questions / at_once)
            batches = rounds * math.ceil(prompts * parts / sizes.rows)
        self.add("labelling", [program], [batches])

    def _generate(self, recipe: GenerateRecipe) -> None:
        opened = self._open(recipe.model, recipe.template)
        sizes = self._sizes(opened, recipe.lengths, 0, recipe.sampling.max_new_tokens)
        sampled = Sampled(PROMPTS_PER_PART, recipe.sampling.batch_size, recipe.sampling)
        self._sample("generation", opened, sizes, sampled, self._rows(recipe.data), 1)

    def _score(self, recipe: ScoreRecipe) -> None:
        opened = self._open(recipe.model, recipe.template)
        sizes = self._sizes(opened, recipe.lengths, self.assumed.responses)
        self._scored(
            "scoring",
            opened,
            sizes,
            recipe.scoring.batch_size,
            recipe.scoring.compute_dtype,
            self._rows(recipe.data),
        )

    def _select(self, recipe: SelectRecipe) -> None:
        opened = self._open(recipe.model, recipe.template)
        rows, responses = self._rows(recipe.data), self.assumed.responses
        if recipe.sampling is not None:
            responses = recipe.sampling.num_samples
            limit = recipe.sampling.max_new_tokens
            sizes = self._sizes(opened, recipe.lengths, responses, limit)
            sampled = Sampled(PROMPTS_PER_PART, recipe.batch_size, recipe.sampling)
            self._sample("generation", opened, sizes, sampled, rows, 1)
        for name in (recipe.model, recipe.reference):
            scored = self._open(name, recipe.template)
            sizes = self._sizes(scored, recipe.lengths, responses)
            self._scored(
                "scoring", scored, sizes, recipe.batch_size, recipe.reward.compute_dtype, rows
            )

    def _scored(
        self,
        stage: str,
        opened: Opened,
        sizes: Sizes,
        batch_size: int,
        dtype: str,
        records: int | None,
    ) -> None:
        rows = self._rounded(batch_size)
        chosen = opened.inference_dtype.name if dtype == "auto" else dtype
        sizes = dataclasses.replace(sizes, rows=rows)
        program = scoring("log-probs", opened, self.mesh, sizes, chosen)
        self.add(stage, [program], [_batches(records, rows)])

    def _sample(
        self,
        stage: str,
        opened: Opened,
        sizes: Sizes,
        sampled: Sampled,
        prompts: float | None,
        times: float | None,
    ) -> None:
        """Samples after so many prompts, so many times."""
        given = sampled.prompts if prompts is None else min(sampled.prompts, int(prompts))
        sampled = dataclasses.replace(sampled, prompts=max(1, given))
        name = "" if stage == "generation" else f"{stage}: "
        first, loop = generating(opened, self.mesh, sizes, sampled, name)
        total = None if prompts is None or times is None else prompts * times
        prefills = _batches(total, first.gives["prompts"])
        loops = None
        if total is not None:
            samples = total * sampled.decoding.num_samples
            loops = samples / (loop.gives["responses"] * loop.loops)
            self.notes.append("samples are planned as long as their limit")
        self.add(stage, [first, loop], [prefills, loops])

    def _open(self, name: str, template: str) -> Opened:
        return open_config(name, self.recipe.attention, template, self.assumed.image)

    def _asked(self, asked: CheckpointAsked, recipe: AlignRecipe, opened: Opened) -> Opened:
        """The checkpoint that a section means; by default the recipe's own in all rounds."""
        if asked.model is None:
            return opened
        return self._open(asked.model, asked.template)

    def _sizes(
        self, opened: Opened, lengths: Lengths | None, responses: int, limit: int = 512
    ) -> Sizes:
        """The largest bucket sizes of a recipe.

        Raises:
          MmpoError: the largest does not hold the picture.
        """
        if lengths is None:
            (prompt,) = fitting_sizes([opened.picture_tokens + TEXT_TOKENS], 4)
            self.notes.append(
                f"no `lengths` are given: prompts have {prompt} tokens, responses {limit}"
            )
            return Sizes(
                1, prompt, responses, bucket(limit, fitting_sizes([limit], 2)), opened.slots
            )
        prompt, response = lengths.prompt[-1], lengths.response[-1]
        if prompt <= opened.picture_tokens:
            raise MmpoError(
                f"lengths.prompt: the largest size is {prompt}, and the picture of a prompt alone "
                f"takes {opened.picture_tokens} tokens of {opened.name}; give a larger one, or "
                "a smaller picture by --image"
            )
        return Sizes(1, prompt, responses, response, opened.slots)

    def _rows(self, data: Any) -> int | None:
        """Rows of the data: said, of the picture world, or those of the file where it is here."""
        if self.assumed.rows is not None:
            return self.assumed.rows
        if isinstance(data, PictureWorldData):
            return data.size
        found = _count_rows(data, isinstance(self.recipe, TrainRecipe))
        if found is None:
            self.notes.append(
                f"{data.path} cannot be read here: --rows says how many rows there are, without "
                "which there are no hours"
            )
        return found

    def _rounded(self, batch_size: int) -> int:
        """Rows of a batch, which all devices share."""
        return -(-batch_size // self.shards) * self.shards


def _batches(rows: float | None, of: float) -> float | None:
    return None if rows is None else math.ceil(rows / of)


@functools.cache
def _check_once(config: Training, opened: Opened, mesh: Mesh) -> None:
    """`check_training`, which takes a while, once for all that a search varies.

    Raises:
      TrainingError: see there.
    """
    check_training(config, opened.model, mesh)


@functools.cache
def _count_rows(data: Any, supervised: bool) -> int | None:
    try:
        return len(data.load(supervised=supervised).records)
    except (DataError, OSError):
        return None
