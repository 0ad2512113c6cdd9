"""All modules with objectives: importing this fills the registry."""

from mmpo_jax.objectives import (  # noqa: F401
    absolute,
    batch_rules,
    image_aware,
    joint,
    on_policy,
    preference,
    rankings,
    reference_free,
    reward_model,
    scored,
    supervised,
    token_level,
    unpaired,
)
