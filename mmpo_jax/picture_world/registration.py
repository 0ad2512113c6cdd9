"""What the picture world adds to the registries: a format of rows, a reward and a data
set of TFDS. Recipes import this; nothing below them knows of the picture world."""

from mmpo_jax.data.formats import register_format
from mmpo_jax.data.readers import TFDS_BUILDERS
from mmpo_jax.picture_world import rewards  # noqa: F401 (registers itself)
from mmpo_jax.picture_world.format import FORMAT

register_format(FORMAT)
TFDS_BUILDERS.append("mmpo_jax.picture_world.tfds_builder")
