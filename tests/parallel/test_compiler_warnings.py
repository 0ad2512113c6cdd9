"""What XLA's partitioner says of a train step on eight devices: nothing.

Where it finds no way from one split of an array to another it makes the array whole on every
device, which it calls an involuntary full rematerialization, and goes on.
"""

import contextlib
import dataclasses
import re

import jax
import numpy as np
import pytest
from helpers import tiny

pytest.importorskip("torch")
from helpers import checks, families
from jax.sharding import PartitionSpec

from mmpo_jax.data.contexts import MAIN, OTHER_IMAGE
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import make_mesh, put_batch, put_params
from mmpo_jax.recipes.optimizers import AdamW
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.optimizer import make_optimizer
from mmpo_jax.training.step import create_state, make_step

WARNING = r"Involuntary full rematerialization"
SHAPE = (2, 2, 2)
WITH_EXPERT = {"fsdp": 2, "expert": 2, "tensor": 2}


@pytest.fixture
def said(capfd):
    """A function that compiles without any cache and gives what the compiler has written."""

    def said(function, *arguments, mesh):
        capfd.readouterr()
        with fresh_compilations(), jax.set_mesh(mesh):
            jax.jit(function).lower(*arguments).compile()
        return re.findall(rf".*{WARNING}.*", capfd.readouterr().err)

    return said


@contextlib.contextmanager
def fresh_compilations():
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_the_warning_is_seen_where_there_is_one(said):
    mesh = make_mesh(*SHAPE)

    def moved(x):
        rows = jax.lax.with_sharding_constraint(2 * x, PartitionSpec(("data", "fsdp")))
        return jax.lax.with_sharding_constraint(rows, PartitionSpec(None, None, "fsdp")) + 1

    assert said(moved, np.zeros((8, 4, 16), np.float32), mesh=mesh)


def step_of(case, batch, terms, contexts, mesh):
    """(the train step of some terms, its arguments)."""
    optimizer = make_optimizer(AdamW(learning_rate=1e-3), lambda step: 1e-3)
    with jax.set_mesh(mesh):
        state = create_state(case.params, case.model, optimizer, (), mesh)
        loss = make_loss(case.model, terms, contexts, remat="full")
        step = make_step(loss, optimizer, lambda step: 1e-3, state)
        return step, (state, put_batch(jax.tree.map(lambda x: x[None], batch), mesh, leading=1))


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_train_steps(family_case, said, family):
    case = family_case(family)
    _, batch = checks.batch_of(case, families.records(family) * 4)
    inputs = tiny.train_batch(batch, np.zeros((8, 2), np.float32))
    mesh = make_mesh(*SHAPE)
    step, arguments = step_of(case, inputs, [make_term("dpo", beta=0.1)], (MAIN,), mesh)
    assert said(step, *arguments, mesh=mesh) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "gemma4_26b"])
def test_a_train_step_of_a_mixture(family_case, said, family):
    case = family_case(family)
    _, batch = checks.batch_of(case, families.records(family) * 4)
    inputs = tiny.train_batch(batch, np.zeros((8, 2), np.float32))
    mesh = make_mesh(**WITH_EXPERT)
    step, arguments = step_of(case, inputs, [make_term("dpo", beta=0.1)], (MAIN,), mesh)
    assert said(step, *arguments, mesh=mesh) == []


@pytest.mark.slow
def test_a_train_step_with_two_images_a_record(family_case, said):
    """Every record is two rows, one after each of its images."""
    case = family_case("llava")
    shown, _ = families.records("llava")
    _, batch = checks.batch_of(case, [shown] * 16)
    inputs = tiny.train_batch(batch, np.zeros((16, 2), np.float32))
    fields = {name: values[::2] for name, values in inputs.fields.items()}
    inputs = dataclasses.replace(inputs, fields=fields)
    mesh = make_mesh(*SHAPE)
    step, arguments = step_of(case, inputs, [make_term("mdpo")], (MAIN, OTHER_IMAGE), mesh)
    assert said(step, *arguments, mesh=mesh) == []


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 5])
def test_a_train_step_with_a_teacher(family_case, said, top_k):
    """Of the same architecture, beside the policy."""
    case, mesh = family_case("llava"), make_mesh(*SHAPE)
    _, batch = checks.batch_of(case, families.records("llava") * 4)
    inputs = dataclasses.replace(tiny.train_batch(batch), teacher=batch)
    terms = [make_term("distillation", top_k=top_k)]
    optimizer = make_optimizer(AdamW(learning_rate=1e-3), lambda step: 1e-3)
    with jax.set_mesh(mesh):
        start = create_state(case.params, case.model, optimizer, (), mesh)
        loss = make_loss(case.model, terms, remat="full", teacher=case.model)
        teacher = put_params(case.params, case.model.rules, mesh)
        placed = put_batch(jax.tree.map(lambda x: x[None], inputs), mesh, leading=1)

        def update(state, batch, teacher):
            step = make_step(loss, optimizer, lambda step: 1e-3, start, teacher=teacher)
            return step(state, batch)

    assert said(update, start, placed, teacher, mesh=mesh) == []
