"""A window of a training's steps, as JAX's profiler sees it."""

from __future__ import annotations

import logging
import os

import jax

from mmpo_jax.core.buckets import copy_folder, local_copy
from mmpo_jax.recipes.training import Profile

log = logging.getLogger(__name__)

FOLDER = "profile"
"""In the run's folder: traces that TensorBoard's profile plugin and Perfetto read."""


class Profiler:
    """Traces the steps of a window; a run that starts within or behind it traces what is left."""

    def __init__(self, profile: Profile | None, folder: str):
        self.profile, self.folder = profile, os.path.join(folder, FOLDER)
        self.local = local_copy(self.folder)
        self.is_tracing = False

    def before(self, step: int) -> None:
        """The step of this number is about to start; the first is 1."""
        profile = self.profile
        if profile is None or self.is_tracing:
            return
        if profile.start <= step < profile.start + profile.steps:
            jax.profiler.start_trace(self.local)
            self.is_tracing = True

    def after(self, step: int, output: jax.Array) -> None:
        """The step was started, and this is an output of it."""
        profile = self.profile
        if profile is not None and self.is_tracing and step >= profile.start + profile.steps - 1:
            output.block_until_ready()
            self.close()

    def close(self) -> None:
        """Writes the trace, also one that the run's end cut short."""
        if self.is_tracing:
            jax.profiler.stop_trace()
            if self.local != self.folder:
                copy_folder(self.local, self.folder)
            self.is_tracing = False
            log.info("%s: the profiler's trace", self.folder)
