"""The programs that sample responses: prompts that are run, and the loop that draws tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmpo_jax.generation.caches import state_tokens
from mmpo_jax.generation.decoding import decode
from mmpo_jax.generation.places import empty_pool, empty_rows, prefill
from mmpo_jax.generation.refill import Layout, choose_layout, pool_sizes
from mmpo_jax.parallel.mesh import batch_shards, batch_spec
from mmpo_jax.planning import abstract
from mmpo_jax.planning.abstract import Sizes, local_bytes
from mmpo_jax.planning.counts import decode_work, forward_work
from mmpo_jax.planning.opened import Opened
from mmpo_jax.planning.programs import Program, computation_of, counted, told_of
from mmpo_jax.recipes.sampling import Decoding


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What is sampled: so many prompts at a time, and how."""

    prompts: int
    """That are given to the sampler at once."""
    batch_size: int
    decoding: Decoding


def generating(
    opened: Opened, mesh: Mesh, sizes: Sizes, sampled: Sampled, name: str = ""
) -> tuple[Program, Program]:
    """(the program that runs prompts, the loop that draws their samples).

    Args:
      opened: the model.
      mesh: the devices.
      sizes: of a prompt; rows are not read.
      sampled: how many prompts and samples.
      name: in front of "prefill" and "decode".
    """
    dtype = opened.inference_dtype
    shards = batch_shards(mesh)
    decoding = Decoding(**sampled.decoding.model_dump(include=set(Decoding.model_fields)))
    states = state_tokens(opened.model.config.decoder, dtype)
    layout = choose_layout(
        sampled.prompts, sizes.prompt, decoding, sampled.batch_size, shards, states
    )
    sizes = Sizes(layout.batch, sizes.prompt, slots=sizes.slots)
    params = abstract.params(opened.model, mesh, opened.dtype, opened.quantization)
    batch = abstract.batch(opened.model, sizes, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    keys = abstract.array((layout.batch, decoding.num_samples), key, mesh, batch_spec(mesh))
    computation = computation_of(opened, mesh, dtype)
    first = Program(
        f"{name}prefill",
        opened.name,
        mesh,
        dtype.name,
        told_of(sizes),
        lambda: prefill.lower(opened.model, params, batch, keys),
        forward_work(computation, sizes, head=False),
        {"parameters": local_bytes(params), "batch": local_bytes(batch)},
        {"prompts": sizes.rows, "tokens": sizes.tokens},
    )
    given = _caches(opened, mesh, params, batch, keys, layout, decoding)
    vectors = (
        abstract.replicated((layout.rows,), jnp.int32, mesh),
        abstract.replicated((shards,), jnp.int32, mesh),
    )
    processor = opened.processor
    options = {
        "decoding": decoding,
        "eos_ids": processor.eos_ids,
        "pad_id": processor.pad_id,
    }
    places = layout.rows * layout.places
    told = (
        f"{layout.rows} rows of {counted(layout.width, 'prompt')} of {sizes.prompt}, "
        f"{counted(layout.places, 'place')} of {decoding.max_new_tokens}"
    )
    second = Program(
        f"{name}decode",
        opened.name,
        mesh,
        dtype.name,
        told,
        lambda: decode.lower(opened.model, params, *given, *vectors, **options),
        decode_work(computation, layout, sizes.prompt, decoding),
        {"parameters": local_bytes(params), "caches": local_bytes(given)},
        {"responses": places / decoding.max_new_tokens, "tokens": places},
        loops=decoding.max_new_tokens,
    )
    return first, second


def _caches(
    opened: Opened,
    mesh: Mesh,
    params: Any,
    batch: Any,
    keys: Any,
    layout: Layout,
    decoding: Decoding,
) -> tuple[Any, Any, Any]:
    """(prompts, samples, pools of the largest size), placed as generation has them."""

    def made(function: Callable, *arguments: Any, **options: Any) -> Any:
        shapes = jax.eval_shape(functools.partial(function, **options), *arguments)
        return abstract.on_rows(shapes, mesh)

    with jax.set_mesh(mesh):
        new = made(functools.partial(prefill, opened.model), params, batch, keys)
        prompts, samples = made(
            empty_rows,
            new,
            rows=layout.rows,
            width=layout.width,
            places=layout.places,
            length=decoding.max_new_tokens,
            pad_id=opened.processor.pad_id,
        )
        size = layout.members * pool_sizes(decoding.max_new_tokens)[-1]
        groups = {"groups": layout.groups, "members": layout.members}
        pool = made(empty_pool, prompts[0], **groups, size=size)
    return prompts, samples, pool
