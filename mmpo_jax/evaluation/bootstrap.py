"""How sure numbers are that are sums over records: intervals, and tests of two models' difference.

Records are resampled as a whole, those of a benchmark in the same way for all models and metrics,
so differences are of the same records. Source: Efron and Tibshirani 1993, An Introduction to the
Bootstrap, chapters 13 (percentile intervals) and 15; McNemar 1947, in its exact form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest

SAMPLES = 2000
"""Resamplings; the smallest p that they can show is 2 / (SAMPLES + 1)."""
SEED = 0
CONFIDENCE = 0.95
AT_ONCE = 1 << 22
"""Weights of records that are held at a time."""

Parts = Float[np.ndarray, "N 2"]
"""What each record adds above and below the fraction: a metric is sum of the one / sum of the
other. Zeros where a record has no part in it."""


def summed(parts: Parts, groups: Int[np.ndarray, " N"]) -> Parts:
    """What groups of records add, [G, 2]: records that are not independent are resampled together.

    Source: Miller 2024, Adding Error Bars to Evals (clustered questions).

    Args:
      parts: of N records.
      groups: number of each record's group, from 0 to G - 1.
    """
    found = np.zeros((groups.max() + 1, 2))
    np.add.at(found, groups, parts)
    return found


def resampled(parts: Sequence[Parts]) -> Float[np.ndarray, "K S"]:
    """Metrics of resampled records, float64[K, S] of S = `SAMPLES`; NaN where one has nothing below
    its fraction.

    Args:
      parts: of K metrics or models, all of the same N records.
    """
    columns = np.concatenate(parts, axis=1).astype(np.float64)
    count, rng = len(columns), np.random.default_rng(SEED)
    sums, size = [], max(1, AT_ONCE // count)
    for start in range(0, SAMPLES, size):
        drawn = min(size, SAMPLES - start)
        places = rng.integers(count, size=(drawn, count)) + np.arange(drawn)[:, None] * count
        weights = np.bincount(places.ravel(), minlength=drawn * count).reshape(drawn, count)
        sums.append(weights @ columns)
    above, below = np.concatenate(sums).T.reshape(len(parts), 2, SAMPLES).swapaxes(0, 1)
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def interval(values: Float[np.ndarray, " S"]) -> tuple[float, float]:
    """The percentiles between which `CONFIDENCE` of resampled values lie; NaN of none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return float("nan"), float("nan")
    rest = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [rest, 1 - rest])
    return float(low), float(high)


def bootstrap_p(differences: Float[np.ndarray, " S"]) -> float:
    """Two-sided p of no difference: twice the share of resampled differences on the rarer side of
    0; NaN of none."""
    finite = differences[np.isfinite(differences)]
    if not finite.size:
        return float("nan")
    sides = (finite <= 0).sum(), (finite >= 0).sum()
    return float(min(1.0, 2 * (min(sides) + 1) / (finite.size + 1)))


def mcnemar_p(start: Parts, other: Parts) -> float | None:
    """Exact two-sided p of no difference, of records that are either right or wrong; None where
    they are more than that, or not the same have a part in the metric."""
    if not (start[:, 1] == other[:, 1]).all() or set(np.unique(start[:, 1])) - {0.0, 1.0}:
        return None
    values = np.unique(np.concatenate([start[:, 0], other[:, 0]]))
    if len(values) > 2 or not (values == 0).any():
        return None
    lost = int((start[:, 0] > other[:, 0]).sum())
    won = int((start[:, 0] < other[:, 0]).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
