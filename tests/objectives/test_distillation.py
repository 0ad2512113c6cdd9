"""The loss of distillation, of divergences that are known."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.numeric import loss_of, random_responses


def test_the_loss_is_the_mean_over_tokens():
    responses = random_responses(2, 3)
    apart = np.random.default_rng(1).random(responses.mask.shape)
    taught = dataclasses.replace(responses, statistics={"divergence": apart})
    with jax.enable_x64(True):
        loss, metrics, _ = loss_of("distillation", taught, beta=0.5)
    wanted = apart[responses.mask].mean()
    assert float(loss) == pytest.approx(wanted, rel=1e-12)
    assert float(metrics["divergence"]) == pytest.approx(wanted)
