"""What reward models run: the critiques that they write, and the rewards that they read."""

from __future__ import annotations

import dataclasses

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.batching import fitting_sizes
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.generation.responses import PROMPTS_PER_PART
from mmpo_jax.planning.abstract import Sizes
from mmpo_jax.planning.opened import Opened
from mmpo_jax.planning.programs import rewarding
from mmpo_jax.planning.sampling import Sampled
from mmpo_jax.planning.stages import Stages
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.recipes.scoring import Rewarding

RESPONSE_TOKENS = 512
"""Of a response without its critique, where no recipe gives bucket sizes."""


def reward_stages(
    stages: Stages,
    stage: str,
    name: str,
    template: str,
    options: Rewarding,
    lengths: Lengths | None,
    responses: int,
    rows: float | None,
) -> None:
    """Adds what a reward model takes to score the responses of so many rows.

    Args:
      stages: of the recipe.
      stage: name of that which scores.
      name, template: of the reward model, as the recipe has them.
      options: how it reads responses.
      lengths: bucket sizes of prompts, and of responses with their critiques.
      responses: of a row.
      rows: None where that is not known.

    Raises:
      MmpoError: the checkpoint has no reward head.
    """
    opened = stages.open(name, template)
    head = opened.model.config.reward_head
    if head is None:
        raise MmpoError(f"{name}: has no reward head, so it scores nothing (docs/reward.md)")
    written = options.critiques
    if written is None:
        written = int(head.critique_prompt is not None and not options.given_critiques)
    critique = options.max_new_tokens if written or options.given_critiques else 0
    sizes = stages.sizes(opened, lengths, responses, RESPONSE_TOKENS + critique)
    if written:
        _critiques(stages, stage, opened, options, sizes, written, rows)
    batch = stages.rounded(options.batch_size)
    dtype = options.compute_dtype
    chosen = opened.inference_dtype.name if dtype == "auto" else dtype
    sizes = dataclasses.replace(sizes, rows=batch, responses=responses * max(1, written))
    program = rewarding(opened, stages.mesh, sizes, chosen)
    stages.add(stage, [program], [None if rows is None else -(-rows // batch)])


def _critiques(
    stages: Stages,
    stage: str,
    opened: Opened,
    options: Rewarding,
    sizes: Sizes,
    written: int,
    rows: float | None,
) -> None:
    """Every response with the question behind it is a prompt of its own here, where the program
    has the responses of a row behind one."""
    (prompt,) = fitting_sizes([sizes.prompt + max(1, sizes.response - options.max_new_tokens)], 4)
    decoding = Decoding(
        num_samples=written,
        temperature=0.7 if written > 1 else 0.0,
        max_new_tokens=options.max_new_tokens,
    )
    sampled = Sampled(PROMPTS_PER_PART, options.batch_size, decoding)
    stages.notes.append("critiques are planned as if each response had its prompt for itself")
    asked = None if rows is None else rows * sizes.responses
    stages.sample(
        f"{stage}: critiques", opened, Sizes(1, prompt, slots=sizes.slots), sampled, asked, 1
    )
