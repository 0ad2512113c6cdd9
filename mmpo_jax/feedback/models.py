"""The models that judges ask: checkpoints by their names, and what the devices hold already."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_checkpoint
from mmpo_jax.checkpoints.locations import fingerprint_location, locate
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.feedback.served import Servers
from mmpo_jax.recipes.feedback import CheckpointAsked


@dataclasses.dataclass
class Models:
    """What the models of a judge run on, and which checkpoint the devices hold already."""

    mesh: Mesh
    attention: str
    servers: Servers
    base: str
    """The recipe's model, which is asked where a section names none."""
    template: str
    """Template of that model's dialogues."""
    seed: int
    dtype: str | None = None
    """What checkpoints are run in; None for the dtype of their weights."""
    held: Checkpoint | None = None
    """What the round starts from, once the devices have it."""

    def name(self, asked: CheckpointAsked) -> tuple[str, str]:
        """(name, template) of the checkpoint that a section means."""
        return (self.base, self.template) if asked.model is None else (asked.model, asked.template)

    def fingerprint(self, asked: CheckpointAsked) -> str:
        """Digest of a checkpoint's files, and of its template and what it is run in where these are
        not its own.

        Raises:
          ModelError: it is not there.
        """
        name, template = self.name(asked)
        files = fingerprint_location(locate(name))
        others = ([] if template == "auto" else [template]) + ([self.dtype] if self.dtype else [])
        return fingerprint_json([files, *others]) if others else files

    def load(self, asked: CheckpointAsked) -> Checkpoint:
        """The checkpoint on the devices: where it is what the round starts from, with the same
        template, they hold both once, read again where the start was let go of. Another one's
        weights take the place of the start's, which whoever needs it next reads again."""
        name, template = self.name(asked)
        if self.held is not None and self._is(self.held, name, template):
            self.held.restore(self.mesh)
            return self.held
        self.make_room()
        return load_checkpoint(name, self.mesh, self.attention, template, self.dtype)

    def make_room(self) -> None:
        """Lets go of the weights that the round starts from, while others are on the devices."""
        if self.held is not None:
            self.held.release()

    def _is(self, held: Checkpoint, name: str, template: str) -> bool:
        same_template = held.processor.template == template
        return same_template and fingerprint_location(locate(name)) == held.fingerprint
