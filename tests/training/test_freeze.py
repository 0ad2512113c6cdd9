"""Freezing by the patterns that docs/models.md names, in every family."""

import re

import jax
import numpy as np
import optax
import pytest
from helpers import meshes, tiny

pytest.importorskip("torch")
from helpers import checks, families

from mmpo_jax.core.trees import flatten
from mmpo_jax.models.buffers import is_buffer
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.step import create_state, make_step, trainable_paths

TOWER, PROJECTOR = "vision_tower/.*", "multi_modal_projector/.*"
EMBEDDINGS, MLP = "language_model/embed_tokens/.*", r"language_model/layers/(\w+/)?mlp/.*"
THEIRS = {
    TOWER: r"model\.(vision_(tower|model)\..*|visual\.(?!(deepstack_)?merger).*"
    r"|embed_vision\.(patch|pos)_.*)",
    PROJECTOR: r"model\.((multi_modal_projector|connector)\..*|visual\.(deepstack_)?merger.*"
    r"|embed_vision\.(multimodal_embedder\.)?embedding_projection\..*)",
    "language_model/.*": r"model\.((language|text)_model|embed_tokens|layers|norm)\..*|lm_head\..*",
    "image_newline": r"model\.image_newline",
}
"""Our pattern -> one for transformers' names of the same parameters; each is in one of them."""
PARTS = {
    EMBEDDINGS: r"model\.((language|text)_model\.)?embed_tokens\..*",
    MLP: r"model\.((language|text)_model\.)?layers\.\d+\.mlp\..*",
}


UNLIKE = ("llava_next", "qwen3_vl_moe", "qwen3_5", "gemma4_e2b", "llama")
"""Families that differ most; a step of each of the others is slow."""


@pytest.mark.parametrize("family", families.FAMILIES)
def test_patterns_name_what_they_say(family_case, family):
    case = family_case(family)
    params, left = flatten(case.params), set(flatten(case.params))
    stored, theirs_all = case.theirs.state_dict(), dict(case.theirs.named_parameters())
    theirs_all |= {name: x for name, x in case.theirs.named_buffers() if name in stored}
    for ours, theirs in (THEIRS | PARTS).items():
        matched = [path for path in params if re.fullmatch(ours, path)]
        named = theirs_all.items()
        expected = sum(x.numel() for name, x in named if re.fullmatch(theirs, name))
        assert sum(params[path].size for path in matched) == expected, ours
        if 0 < len(matched) < len(params):
            others = {path for path in params if not is_buffer(path)} - set(matched)
            assert set(trainable_paths(list(params), (ours,))) == others
        left -= set(matched)
    assert not left


@pytest.mark.parametrize(
    "family",
    [
        family if family in UNLIKE else pytest.param(family, marks=pytest.mark.slow)
        for family in families.FAMILIES
    ],
)
def test_what_is_frozen_keeps_its_bits(family_case, family):
    case = family_case(family)
    _, batch = checks.batch_of(case, families.records(case.model.config.family))
    before = flatten(case.params)
    wanted = (TOWER, "image_newline") if case.model.family.images else (EMBEDDINGS, MLP)
    patterns = [p for p in wanted if any(re.fullmatch(p, path) for path in before)]
    mesh = meshes.one_device()
    optimizer, schedule = optax.sgd(0.1), optax.constant_schedule(0.1)
    state = create_state(case.params, case.model, optimizer, tuple(patterns), mesh)
    step = make_step(make_loss(case.model, [make_term("sft")]), optimizer, schedule, state)
    with jax.set_mesh(mesh):
        state, metrics = step(state, jax.tree.map(lambda leaf: leaf[None], tiny.train_batch(batch)))
    assert metrics["finite"] == 1
    assert state.frozen and not state.params.keys() & state.frozen.keys()
    for path, leaf in state.frozen.items():
        assert is_buffer(path) or any(re.fullmatch(pattern, path) for pattern in patterns)
        assert np.asarray(leaf).tobytes() == before[path].tobytes(), path
    for path, leaf in state.params.items():
        if path.endswith("/kernel"):
            assert np.abs(np.asarray(leaf) - before[path]).max() > 0, path
