"""Pairwise losses as their papers have them, in NumPy: of one pair of numbers each, or of lists of
pairs where pairs depend on each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class One:
    """A response."""

    policy: float
    """Its log-prob, as the reference's a sum over tokens."""
    reference: float
    length: int
    fields: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.policy - self.reference

    @property
    def mean_ratio(self) -> float:
        return self.ratio / self.length

    @property
    def mean(self) -> float:
        return self.policy / self.length


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x)) if x >= 0 else np.exp(x) / (1 + np.exp(x))


def log_sigmoid(x: float) -> float:
    return -np.logaddexp(0.0, -x)


def odds(response: One) -> float:
    probability = np.exp(response.mean)
    return probability / (1 - probability)


def dpo(won, lost, beta=0.1, label_smoothing=0.0):
    z = beta * (won.ratio - lost.ratio)
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


def sigmoid_norm(won, lost, beta=0.1):
    return -log_sigmoid(beta * (won.mean_ratio - lost.mean_ratio))


def robust(won, lost, beta=0.1, label_smoothing=0.1):
    e, z = label_smoothing, beta * (won.ratio - lost.ratio)
    return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


def hinge(won, lost, beta=0.1):
    return max(0.0, 1 - beta * (won.ratio - lost.ratio))


def slic(won, lost, delta=1.0, sft_weight=0.1):
    return max(0.0, delta - won.policy + lost.policy) - sft_weight * won.policy


def ipo(won, lost, beta=0.1, length_average=True):
    if length_average:
        return (won.mean_ratio - lost.mean_ratio - 1 / (2 * beta)) ** 2
    return (won.ratio - lost.ratio - 1 / (2 * beta)) ** 2


def exo_pair(won, lost, beta=0.1, label_smoothing=1e-3):
    weights = np.exp([beta * won.ratio, beta * lost.ratio])
    model, target = weights / weights.sum(), np.array([1 - label_smoothing, label_smoothing])
    return float(np.sum(model * np.log(model / target)))


def discopop(won, lost, beta=0.1, tau=0.05):
    z = beta * (won.ratio - lost.ratio)
    mixed = sigmoid(z / tau)
    return -log_sigmoid(z) * (1 - mixed) + np.exp(-z) * mixed


def dpop(won, lost, beta=0.3, penalty=50.0):
    fall = max(0.0, won.reference - won.policy)
    return -log_sigmoid(beta * (won.ratio - lost.ratio - penalty * fall))


def r_dpo(won, lost, beta=0.1, alpha=0.01):
    return -log_sigmoid(
        beta * won.ratio + alpha * won.length - beta * lost.ratio - alpha * lost.length
    )


def rpo(won, lost, beta=0.1, sft_weight=1.0):
    return -log_sigmoid(beta * (won.ratio - lost.ratio)) - sft_weight * won.mean


def nca_pair(won, lost, beta=0.1):
    a, b = beta * won.ratio, beta * lost.ratio
    return -log_sigmoid(a) - (log_sigmoid(-a) + log_sigmoid(-b)) / 2


def bco_pair(won, lost, beta=0.1):
    return -np.log(sigmoid(beta * won.ratio)) - np.log(1 - sigmoid(beta * lost.ratio))


def apo_zero(won, lost, beta=0.1):
    return 1 - sigmoid(beta * won.ratio) + sigmoid(beta * lost.ratio)


def apo_down(won, lost, beta=0.1):
    return sigmoid(beta * won.ratio) + 1 - sigmoid(beta * (won.ratio - lost.ratio))


def sppo_hard(won, lost, beta=0.1):
    return (won.ratio - 1 / (2 * beta)) ** 2 + (lost.ratio + 1 / (2 * beta)) ** 2


def sppo(won, lost, beta=1e-3):
    return sum((x.ratio - (x.fields["win_rate"] - 0.5) / beta) ** 2 for x in (won, lost)) / 2


def cal_dpo(won, lost, beta=0.1):
    return -log_sigmoid(won.ratio - lost.ratio) + sppo_hard(won, lost, beta)


def simpo(won, lost, beta=2.0, gamma=1.0):
    return -log_sigmoid(beta * won.policy / won.length - beta * lost.policy / lost.length - gamma)


def cpo(won, lost, beta=0.1, sft_weight=1.0):
    return -log_sigmoid(beta * (won.policy - lost.policy)) - sft_weight * won.mean


def orpo(won, lost, beta=0.1):
    return -won.mean - beta * log_sigmoid(np.log(odds(won) / odds(lost)))


def asft(won, lost, beta=0.1):
    return (
        -won.mean - beta * log_sigmoid(np.log(odds(won))) - beta * log_sigmoid(-np.log(odds(lost)))
    )


def alphapo(won, lost, beta=2.5, gamma=0.25, alpha=0.25):
    def reward(x):
        return x.mean if alpha == 0 else (1 - np.exp(x.mean) ** -alpha) / alpha

    return -log_sigmoid(beta * (reward(won) - reward(lost)) - gamma)


def gap(won, lost, name="score"):
    return won.fields[name] - lost.fields[name]


def mm_dpo(won, lost, beta=0.1, w_=0.5, k=0.5):
    scaled = beta * (1 + w_ * (1 - np.exp(-k * gap(won, lost))))
    return -log_sigmoid(np.clip(scaled, beta, (1 + w_) * beta) * (won.ratio - lost.ratio))


def odpo(won, lost, beta=0.1, alpha=1.0, offset="log"):
    found = gap(won, lost)
    shift = np.log(max(found, 1e-6)) if offset == "log" else found
    return -log_sigmoid(beta * (won.ratio - lost.ratio) - alpha * shift)


def mmpo(won, lost, beta=0.01, tau=2.2):
    p, z = sigmoid(tau * gap(won, lost)), beta * (won.ratio - lost.ratio)
    return -p * log_sigmoid(z) - (1 - p) * log_sigmoid(-z)


def cream(won, lost, beta=0.1):
    c, z = won.fields["consistency"], beta * (won.ratio - lost.ratio)
    return c * -log_sigmoid(z) + (1 - c) * -log_sigmoid(-z)


def modpo(won, lost, beta=0.1, dimensions=None):
    rewards = {
        id(x): beta * x.ratio - sum(v * x.fields[f"scores/{k}"] for k, v in dimensions.items())
        for x in (won, lost)
    }
    own = 1 - sum(dimensions.values())
    return -log_sigmoid((rewards[id(won)] - rewards[id(lost)]) / own)


def uni_dpo(won, lost, beta=2.0, eta=0.7, gamma=3.0, tau_ref=2.0, sft_weight=1e-3, tau_good=2.5):
    quality = sigmoid(eta * gap(won, lost))
    performance = (1 - sigmoid(beta * (won.mean - lost.mean) - tau_ref)) ** gamma
    loss = -quality * performance * log_sigmoid(beta * (won.mean_ratio - lost.mean_ratio))
    if won.reference > won.policy and won.fields["score"] >= tau_good:
        loss -= sft_weight * won.mean
    return loss


PAIRS: dict[str, Callable[..., float]] = {
    formula.__name__: formula
    for formula in (
        dpo, sigmoid_norm, robust, hinge, slic, ipo, exo_pair, discopop, dpop, r_dpo, rpo,
        nca_pair, bco_pair, apo_zero, apo_down, sppo_hard, sppo, cal_dpo,
        simpo, cpo, orpo, asft, alphapo,
        mm_dpo, odpo, mmpo, cream, modpo, uni_dpo,
    )
}  # fmt: skip

Pairs = Sequence[tuple[One, One]]


def aot(pairs: Pairs, frozen: Pairs, beta=0.1, label_smoothing=0.0):
    ours = sorted(won.policy - lost.policy for won, lost in pairs)
    theirs = sorted(won.reference - lost.reference for won, lost in pairs)
    return smoothed([beta * (a - b) for a, b in zip(ours, theirs, strict=True)], label_smoothing)


def aot_unpaired(pairs: Pairs, frozen: Pairs, beta=0.1, label_smoothing=0.0):
    chosen, rejected = (
        sorted(won.ratio for won, _ in pairs),
        sorted(lost.ratio for _, lost in pairs),
    )
    z = [beta * (a - b) for a, b in zip(chosen, rejected, strict=True)]
    return smoothed(z, label_smoothing)


def smoothed(z: Sequence[float], e: float) -> float:
    return np.mean([-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x) for x in z])


def selection(pairs: Pairs, centre: float, drop: float) -> tuple[list[int], float]:
    """(places of the pairs whose Gaussian weight is largest, the mean of their margins)."""
    margins = np.array([won.ratio - lost.ratio for won, lost in pairs])
    likely = np.argsort(-np.exp(-0.5 * (margins - centre) ** 2 / margins.var()), kind="stable")
    chosen = likely[: max(1, int((1 - drop) * len(pairs) + 1e-9))]
    return chosen.tolist(), margins[chosen].mean()


def beta_dpo(pairs: Pairs, frozen: Pairs, beta=0.1, alpha=0.6, drop=0.2, momentum=0.9, before=0.0):
    centre = momentum * before + (1 - momentum) * np.mean(
        [won.ratio - lost.ratio for won, lost in frozen]
    )
    chosen, average = selection(frozen, centre, drop)
    used = max(1e-3, beta * (1 + alpha * (average - centre)))
    return np.mean([dpo(*pairs[i], beta=used) for i in chosen])


def mm_dpo_batch(pairs: Pairs, frozen: Pairs, beta=0.1, w=0.1, drop=0.2):
    centre = np.mean([won.ratio - lost.ratio for won, lost in frozen])
    _, average = selection(frozen, centre, drop)
    return np.mean(
        [dpo(*pair, beta=max(1e-3, beta * (1 + w * (average - centre)))) for pair in pairs]
    )


BATCHES: dict[str, Callable[..., Any]] = {
    formula.__name__: formula for formula in (aot, aot_unpaired, beta_dpo, mm_dpo_batch)
}
"""(pairs, the pairs as statistics see them, **options) -> loss; only the first have a gradient."""
