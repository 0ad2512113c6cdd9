"""AdamW, Adafactor, clipping and schedules against torch and transformers."""

import functools
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import meshes, tiny
from jax.sharding import PartitionSpec

from mmpo_jax.objectives.sums import Sums
from mmpo_jax.recipes.optimizers import Adafactor, AdamW, Cosine, Linear, WarmupStableDecay
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import create_state, make_step

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

pytestmark = pytest.mark.parity

STEPS = 30
CONFIG = AdamW(
    learning_rate=0.05,
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

    schedule = make_schedule(Cosine(warmup_ratio=0.2), CONFIG.learning_rate, STEPS)
    optimizer = make_optimizer(CONFIG, schedule)
    mesh = meshes.one_device()
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
    schedule = make_schedule(Cosine(warmup_ratio=ratio), 1.0, steps)
    warmup = int(np.ceil(steps * ratio))
    theirs = transformers.get_cosine_schedule_with_warmup(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), warmup, steps
    )
    for step in range(warmup, steps + 1):
        expected = theirs.lr_lambdas[0](step)
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)
    # The rise is that of a warm-up with one step more, whose first, at a rate of 0, is left out.
    rise = transformers.get_constant_schedule_with_warmup(theirs.optimizer, warmup + 1)
    for step in range(warmup):
        expected = rise.lr_lambdas[0](step + 1)
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("scale_parameter", "weight_decay"), [(False, 0.0), (False, 0.3), (True, 0.0)]
)
def test_adafactor_equals_transformers(scale_parameter, weight_decay):
    """Ten steps of a stack of two layers here, and of two matrices there."""
    config = Adafactor(
        learning_rate=0.02,
        weight_decay=weight_decay,
        max_grad_norm=1e9,
        scale_parameter=scale_parameter,
        clipping_threshold=0.8,
        decay_rate=0.7,
        min_dim_size_to_factor=1,
    )
    rng = np.random.default_rng(0)
    params = {
        "tower/layers/dense/kernel": np.float32(rng.standard_normal((2, 6, 9))),
        "head/kernel": np.float32(rng.standard_normal((7, 4))),
        "tower/layers/dense/bias": np.float32(rng.standard_normal((2, 9))),
    }
    theirs = {
        path: [
            torch.nn.Parameter(torch.tensor(part))
            for part in (leaf if "layers" in path else [leaf])
        ]
        for path, leaf in params.items()
    }
    whole = [p for path, parts in theirs.items() if not path.endswith("/bias") for p in parts]
    reference = transformers.Adafactor(
        [
            {"params": whole, "weight_decay": weight_decay},
            {"params": theirs["tower/layers/dense/bias"], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        clip_threshold=0.8,
        decay_rate=-0.7,
        scale_parameter=scale_parameter,
        relative_step=False,
        warmup_init=False,
    )
    optimizer = make_optimizer(config, lambda step: config.learning_rate)
    state = optimizer.init(params)
    for _ in range(10):
        grads = {p: np.float32(rng.standard_normal(leaf.shape)) for p, leaf in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for path, parts in theirs.items():
            for place, part in enumerate(parts):
                part.grad = torch.tensor(grads[path][place] if len(parts) > 1 else grads[path])
        reference.step()
    for path, parts in theirs.items():
        expected = np.stack([part.detach().numpy() for part in parts])
        found = np.asarray(params[path]).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6, err_msg=path)


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (Linear(warmup_ratio=0.1), transformers.get_linear_schedule_with_warmup),
        (
            WarmupStableDecay(warmup_ratio=0.1, decay_ratio=0.25, min_ratio=0.1),
            functools.partial(
                transformers.get_wsd_schedule,
                num_decay_steps=10,
                min_lr_ratio=0.1,
                decay_type="linear",
            ),
        ),
        (
            WarmupStableDecay(warmup_ratio=0.1, decay_ratio=0.25, decay="cosine"),
            functools.partial(
                transformers.get_wsd_schedule, num_decay_steps=10, decay_type="cosine"
            ),
        ),
        (
            WarmupStableDecay(warmup_ratio=0.1, decay_ratio=0.25, decay="1-sqrt"),
            functools.partial(
                transformers.get_wsd_schedule, num_decay_steps=10, decay_type="1-sqrt"
            ),
        ),
    ],
    ids=["linear", "stable-linear", "stable-cosine", "stable-sqrt"],
)
def test_other_schedules_equal_transformers(config, make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = make(optimizer, num_warmup_steps=4, num_training_steps=40).lr_lambdas[0]
    schedule = make_schedule(config, 1.0, 40)
    for step in range(4, 41):
        assert float(schedule(step)) == pytest.approx(theirs(step), abs=1e-6), step
