"""What a round starts from, in the form that its stages need."""

from __future__ import annotations

from jax.sharding import Mesh

from mmpo_jax.checkpoint import Checkpoint, load_checkpoint
from mmpo_jax.data.processor import Processor
from mmpo_jax.models.model import Model


class Start:
    """A model that generates and is evaluated in one dtype, and is trained from in another.

    Its weights lie on the devices in one form at a time, and are read again where the other one is
    needed: training has no memory for both. So callers keep none of them.
    """

    def __init__(self, name: str, mesh: Mesh, attention: str, template: str, rounded: bool):
        """
        Args:
          name: as a recipe's `model` has it.
          mesh: the devices.
          attention, template: see `load_start`.
          rounded: whether all but training computes in rounded weights, see `load_rounded`.
        """
        self._load = lambda form: load_checkpoint(name, mesh, attention, template, form)
        self._rounded = rounded
        self._held: Checkpoint | None = None

    def computing(self) -> Checkpoint:
        """For whatever is not training."""
        return self._in_form(self._rounded)

    def exact(self) -> Checkpoint:
        """With the weights that training goes on from."""
        return self._in_form(False)

    def release(self) -> None:
        """Lets go of the weights until they are asked for again."""
        self._held = None

    def _in_form(self, rounded: bool) -> Checkpoint:
        if self._held is None or self._held.rounded != rounded:
            self._held = None  # before the other one comes
            self._held = self._load(rounded)
        return self._held

    @property
    def _either(self) -> Checkpoint:
        return self._held or self.computing()

    @property
    def model(self) -> Model:
        return self._either.model

    @property
    def processor(self) -> Processor:
        return self._either.processor

    @property
    def fingerprint(self) -> str:
        """Of the weights that training goes on from."""
        return self._either.fingerprint
