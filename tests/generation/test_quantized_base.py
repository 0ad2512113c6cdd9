"""A quantised model with adapters says what its dequantised and merged weights say."""

import dataclasses

import numpy as np
import pytest
from helpers.meshes import one_device

from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.generation.responses import generate_responses
from mmpo_jax.models.lora import B, Lora, add_adapters, cast_params, merge_adapters
from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.recipes.sampling import Decoding


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_greedy_responses(kind):
    mesh = one_device()
    start = load_start("builtin:picture_world", mesh=mesh, quantization=kind)
    lora = Lora(rank=2, dora=True)
    flat = flatten(add_adapters(start.params, start.model, lora, (), 0))
    rng = np.random.default_rng(0)
    for path, leaf in flat.items():
        if path.endswith(B):
            flat[path] = (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32)
    adapted = unflatten(flat)
    records = tokenize_records(prompt_records("test", 5, 6, 48), start.processor, None)[0]
    lengths, decoding = fitting_lengths(records), Decoding(temperature=0, max_new_tokens=16)

    def said(params):
        checkpoint = dataclasses.replace(start, params=params)
        made = generate_responses(
            checkpoint, records, decoding, lengths, mesh, batch_size=6, seed=0
        )
        return [response.token_ids.tolist() for response in made]

    ours = said(cast_params(adapted, np.float32))
    assert ours == said(merge_adapters(adapted))
    assert len({tuple(ids) for ids in ours}) > 1
