"""AdamW, clipping and the schedule against torch and transformers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from jax.sharding import AxisType, PartitionSpec

from mmpo_jax.objectives.sums import Sums
from mmpo_jax.parallel.mesh import AXES
from mmpo_jax.recipes.training import Optimizer
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import create_state, make_step

torch = pytest.importorskip("torch")
from transformers import get_cosine_schedule_with_warmup  # noqa: E402

pytestmark = pytest.mark.parity

STEPS = 30
CONFIG = Optimizer(
    learning_rate=0.05,
    warmup_ratio=0.2,
    weight_decay=0.3,
    beta1=0.8,
    beta2=0.95,
    epsilon=1e-6,
    max_grad_norm=0.7,
)


def test_thirty_steps_equal_torch():
    rng = np.random.default_rng(0)
    x, y = (
        np.float32(rng.standard_normal((STEPS, 8, 5))),
        np.float32(rng.standard_normal((STEPS, 8, 3))),
    )
    kernel = np.float32(rng.standard_normal((5, 3)))
    scale, bias = np.float32(rng.standard_normal(5)), np.float32(rng.standard_normal(3))

    def forward(params, batch):
        return (batch[0] * params["norm"]["scale"]) @ params["dense"]["kernel"] + params["dense"][
            "bias"
        ]

    def evaluate(out, batch):
        return Sums(jnp.sum((out - batch[1]) ** 2), jnp.float32(8), {})

    loss = tiny.row_loss(forward, evaluate)

    schedule = make_schedule(CONFIG, STEPS)
    optimizer = make_optimizer(CONFIG, schedule)
    mesh = jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    model = types.SimpleNamespace(rules=((r".*", PartitionSpec()),))
    tree = {"dense": {"kernel": kernel, "bias": bias}, "norm": {"scale": scale}}
    state = create_state(tree, model, optimizer, (), mesh)
    step = make_step(loss, optimizer, schedule, state)

    theirs = {
        "dense/kernel": torch.nn.Parameter(torch.tensor(kernel)),
        "dense/bias": torch.nn.Parameter(torch.tensor(bias)),
        "norm/scale": torch.nn.Parameter(torch.tensor(scale)),
    }
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs["dense/kernel"]], "weight_decay": CONFIG.weight_decay},
            {"params": [theirs["dense/bias"], theirs["norm/scale"]], "weight_decay": 0.0},
        ],
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.epsilon,
    )
    for i in range(STEPS):
        state, metrics = step(state, (x[i][None], y[i][None]))
        for group in adamw.param_groups:
            group["lr"] = float(metrics["learning_rate"])
        adamw.zero_grad()
        out = (torch.tensor(x[i]) * theirs["norm/scale"]) @ theirs["dense/kernel"]
        loss_value = ((out + theirs["dense/bias"] - torch.tensor(y[i])) ** 2).sum() / 8
        loss_value.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), CONFIG.max_grad_norm)
        adamw.step()
        assert float(metrics["loss"]) == pytest.approx(loss_value.item(), rel=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    for path, leaf in theirs.items():
        np.testing.assert_allclose(state.params[path], leaf.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "ratio"), [(40, 0.1), (7, 0.0), (100, 0.03)])
def test_decay_equals_transformers(steps, ratio):
    config = Optimizer(learning_rate=1.0, warmup_ratio=ratio)
    schedule = make_schedule(config, steps)
    warmup = int(np.ceil(steps * ratio))
    theirs = get_cosine_schedule_with_warmup(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), warmup, steps
    )
    for step in range(warmup, steps + 1):
        expected = theirs.lr_lambdas[0](step)
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)
