"""What a program computes and moves, and how often it computes what it needs once."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program computes and moves."""

    flops: float
    """Over all devices, with what is computed again in the backward pass."""
    model_flops: float
    """Over all devices, what the model needs: each product once, as utilisation is told by."""
    bytes: float
    """Bytes that a device reads from and writes to its memory."""
    exchanged: float = 0.0
    """Bytes that a device sends by the split of parameters and activations alone."""

    def __add__(self, other: Work) -> Work:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(a + b for a, b in pairs))

    def times(self, count: float) -> Work:
        return Work(*(count * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often the products of a part are computed for every time that they are needed."""

    forward: int = 1
    """Forward, and again where the backward pass recomputes it."""
    inputs: int = 0
    """1 where a gradient by the inputs is taken."""
    weights: int = 0
    """1 where a gradient by the kernel is taken."""

    @property
    def computed(self) -> int:
        return self.forward + self.inputs + self.weights

    @property
    def needed(self) -> int:
        return 1 + self.inputs + self.weights
