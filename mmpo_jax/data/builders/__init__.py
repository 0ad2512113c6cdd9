"""TFDS data sets from published files that the user has downloaded; importing registers them."""

from mmpo_jax.data.builders.mm_rlhf import MmRlhf
from mmpo_jax.data.builders.rlaif_v import RlaifV

__all__ = ["MmRlhf", "RlaifV"]
