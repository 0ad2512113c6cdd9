"""The subcommands of `mmpo`, one a file."""

import mmpo_jax.picture_world.registration  # noqa: F401 (what any of them reads or lists)
