"""Freezing by the patterns that docs/models.md names, in every family."""

import re

import jax
import numpy as np
import optax
import pytest
import tiny

pytest.importorskip("torch")
import checks
import families
from jax.sharding import AxisType

from mmpo_jax.models.families import FAMILIES
from mmpo_jax.models.huggingface import flatten
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import AXES
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.step import create_state, make_step, trainable_paths

WITH_IMAGES = [name for name, family in FAMILIES.items() if family.images]
TOWER, PROJECTOR = "vision_tower/.*", "multi_modal_projector/.*"
THEIRS = {
    TOWER: r"model\.(vision_tower\..*|visual\.(?!merger).*)",
    PROJECTOR: r"model\.(multi_modal_projector\..*|visual\.merger\..*)",
    "language_model/.*": r"model\.language_model\..*|lm_head\..*",
    "image_newline": r"model\.image_newline",
}
"""Our pattern -> one for transformers' names of the same parameters."""


@pytest.fixture(params=WITH_IMAGES)
def case(request, family_case):
    return family_case(request.param)


def test_patterns_name_what_they_say(case):
    params, left = flatten(case.params), set(flatten(case.params))
    for ours, theirs in THEIRS.items():
        matched = [path for path in params if re.fullmatch(ours, path)]
        named = case.theirs.named_parameters()
        expected = sum(x.numel() for name, x in named if re.fullmatch(theirs, name))
        assert sum(params[path].size for path in matched) == expected, ours
        if expected:
            assert set(trainable_paths(list(params), (ours,))) == set(params) - set(matched)
        left -= set(matched)
    assert not left


def test_what_is_frozen_keeps_its_bits(case):
    _, batch = checks.batch_of(case, families.records(case.model.config.family))
    before = flatten(case.params)
    patterns = [TOWER, "image_newline"] if "image_newline" in before else [TOWER]
    kinds, device = (AxisType.Auto,) * 3, jax.devices()[:1]
    mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=kinds, devices=device)
    optimizer, schedule = optax.sgd(0.1), optax.constant_schedule(0.1)
    state = create_state(case.params, case.model, optimizer, tuple(patterns), mesh)
    step = make_step(make_loss(case.model, [make_term("sft")]), optimizer, schedule, state)
    with jax.set_mesh(mesh):
        state, metrics = step(state, jax.tree.map(lambda leaf: leaf[None], tiny.train_batch(batch)))
    assert metrics["finite"] == 1
    assert state.frozen and not state.params.keys() & state.frozen.keys()
    for path, leaf in state.frozen.items():
        assert path.startswith("vision_tower/") or path == "image_newline"
        assert np.asarray(leaf).tobytes() == before[path].tobytes(), path
    for path, leaf in state.params.items():
        if path.endswith("/kernel"):
            assert np.abs(np.asarray(leaf) - before[path]).max() > 0, path
