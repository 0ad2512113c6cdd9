"""Metrics on Weights & Biases too, where a recipe asks for that."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from typing import Any

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.processes import on_one
from mmpo_jax.recipes.training import WandB

log = logging.getLogger(__name__)

FINISH_SECONDS = 120.0
"""How long the end of a training waits for the server, at most."""
STEP = "step"
"""What charts have on their horizontal axis."""


def check_tracking(config: WandB | None) -> None:
    """Looks whether metrics can be tracked, before anything heavy starts.

    Args:
      config: of the recipe; None where nothing is tracked.

    Raises:
      MmpoError: the package is not installed, or there is no key for its server.
    """
    if config is not None:
        on_one(lambda: _check(config))


def _check(config: WandB) -> None:
    wandb = _package()
    if (config.mode or os.environ.get("WANDB_MODE", "online")) != "online":
        return
    try:
        wandb.login(force=True)  # which asks for a key where somebody sits at a terminal
    except wandb.errors.UsageError as error:
        raise MmpoError(
            f"training.wandb: {str(error).rstrip('.')}; set WANDB_API_KEY, or take `mode: offline` "
            "and `wandb sync` afterwards"
        ) from error
    except wandb.errors.Error as error:
        log.warning("training.wandb: %s", error)  # the server may be up when training starts


def track_run(
    config: WandB | None, name: str, run_id: str, identity: Mapping[str, Any], folder: str
) -> WandbRun | None:
    """The run on Weights & Biases, see `WandbRun`; None where nothing is tracked, or where the
    server cannot be reached: a training that is started again does not depend on it."""
    if config is None:
        return None
    try:
        return WandbRun(config, name, run_id, identity, folder)
    except Exception as error:  # whatever the package raises
        log.warning("training.wandb: no run can be opened, and nothing is sent: %s", error)
        return None


def _package() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise MmpoError(
            "training.wandb: the package wandb is not installed: pip install 'mmpo_jax[wandb]'"
        ) from error


class WandbRun:
    """A run on Weights & Biases that goes on whenever the training does."""

    def __init__(
        self, config: WandB, name: str, run_id: str, identity: Mapping[str, Any], folder: str
    ):
        """
        Args:
          config: of the recipe.
          name: of the run, where the recipe gives none.
          run_id: by which it is found again.
          identity: what the run is made of, as JSON.
          folder: of this machine, in which the package keeps its files, in `wandb/`.
        """
        wandb = _package()
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or name,
            id=run_id,
            resume="allow",
            mode=config.mode,
            dir=folder,
            config=dict(identity),
            # What is printed is ours, and so is what the package would sum up at the end.
            settings=wandb.Settings(
                console="off",
                quiet=True,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        # Steps after the last checkpoint come again; by its own count the package would drop them.
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)
        self.is_over = False
        self.folder = os.path.join(folder, "wandb")

    def log(self, row: Mapping[str, float]) -> None:
        """Sends a line of `metrics.jsonl`; what goes wrong is said once, and ends no training."""
        if self.is_over:
            return
        try:
            self.run.log(dict(row))
        except Exception as error:  # whatever the package raises
            log.warning("training.wandb: nothing more is sent: %s", error)
            self.is_over = True

    def close(self) -> None:
        """Waits until all is sent, for `FINISH_SECONDS` at most."""
        try:
            self.run.finish()
        except Exception as error:  # whatever the package raises
            log.warning(
                "training.wandb: not all was sent: %s; `wandb sync` sends the rest from %s",
                error,
                self.folder,
            )
