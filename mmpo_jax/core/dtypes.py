"""Names of dtypes that options take; loads nothing."""

from typing import Literal

SaveDtype = Literal["float32", "bfloat16", "bfloat16_stochastic", "float16"]
"""How weights are written. `bfloat16_stochastic` rounds up or down at random, the nearer of both
the more often, so that the mean over many weights is what they were."""
