"""Compiles models for TPUs that are not there and prints what they take of a chip's memory.

Shapes come from published config values, weights are not needed: the compiler of `libtpu`, a
package that runs on any CPU, says whether a program fits. The programs are those of the library:
log-probs of a pair of responses, one step of DPO on it, and generation.

    python benchmarks/compile_for_tpu.py --topology v5e:8x8 --models LLaVA-1.5-7B

With `--fast` it takes a quarter of the time, and memory comes out a few per cent lower, as nothing
is fetched ahead of its use. A model is an entry of `MODELS`, a kind of chip one of `CHIPS`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

# Before jax is imported: no TPU is used, locked, or looked for on the network.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-8"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import jax
import jax.numpy as jnp
import transformers
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.pipeline import TrainBatch
from mmpo_jax.generation.decoding import decode
from mmpo_jax.generation.places import empty_pool, empty_rows, prefill, row_spec
from mmpo_jax.generation.refill import choose_layout
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.layout import pad_size
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.models.model import Model, read_config
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import AXES, BATCH, param_shardings
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.recipes.training import Optimizer
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import make_step, optimizer_shardings

GIB = 2**30
CHIPS = {"v5e": 16, "v5p": 95, "v6e": 32}
"""GiB of memory; libtpu keeps a part for itself, a quarter of one on v5e."""
ROWS = 1
"""Prompts for every chip, or for the chips that share rows on the `tensor` axis."""
RESPONSES, RESPONSE_TOKENS = 2, 512
SAMPLES, NEW_TOKENS = 8, 512
REMAT = "full"


@dataclasses.dataclass(frozen=True)
class Target:
    """A published model at the shapes it is aligned at."""

    config: Callable[[], Any]
    """Makes the transformers config, from the values of its config.json."""
    prompt: int
    """P: image tokens and some text."""
    slots: int = 0
    """I: rows of pixels per prompt."""
    train_mesh: tuple[int, int, int] = (1, -1, 1)
    """data, fsdp, tensor; -1 takes the chips that the others leave. For log-probs too."""
    generate_mesh: tuple[int, int, int] = (-1, 1, 8)


def decoder(
    size: int,
    wide: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    theta: float,
    **more: Any,
) -> dict[str, Any]:
    """What a text config says of a decoder's shape."""
    return {
        "hidden_size": size,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **more,
    }


CLIP = transformers.CLIPVisionConfig(  # ViT-L/14 at 336 pixels: 576 tokens a tile
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
VICUNA_7B = decoder(4096, 11008, 32, 32, 32, 32064, 1e4)
VICUNA_13B = decoder(5120, 13824, 40, 40, 40, 32064, 1e4)
YI_34B = decoder(7168, 20480, 60, 56, 8, 64064, 5e6)
QWEN_7B = decoder(3584, 18944, 28, 28, 4, 152064, 1e6)
QWEN_72B = decoder(8192, 29568, 80, 64, 8, 152064, 1e6)


def llava(text: dict[str, Any]) -> Any:
    return transformers.LlavaConfig(
        vision_config=CLIP,
        text_config=transformers.LlamaConfig(**text),
        image_token_index=32000,
        tie_word_embeddings=False,
    )


def llava_next(text: dict[str, Any]) -> Any:
    return transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config=transformers.LlamaConfig(**text),
        image_token_index=64000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        tie_word_embeddings=False,
    )


def llava_onevision(text: dict[str, Any]) -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=transformers.Qwen2Config(**text | {"vocab_size": 152000}),
        image_token_index=151646,
        video_token_index=151647,
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        tie_word_embeddings=False,
    )


def qwen_vl(text: dict[str, Any], wide: int) -> Any:
    sections = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": wide,
            "num_heads": 16,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config=text | {"rope_parameters": sections},
        tie_word_embeddings=False,
    )


def internvl(text: dict[str, Any]) -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    text = text | {"vocab_size": 151674, "rope_parameters": rope}
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            attention_bias=True,
            image_size=448,
            patch_size=14,
            layer_scale_init_value=0.1,
        ),
        text_config=transformers.Qwen2Config(**text),
        image_token_id=151667,
        tie_word_embeddings=False,
    )


MODELS = {
    "LLaVA-1.5-7B": Target(lambda: llava(VICUNA_7B), prompt=640, slots=1),
    "LLaVA-1.5-13B": Target(lambda: llava(VICUNA_13B), prompt=640, slots=1),
    # A picture of 672 x 672 pixels: 4 tiles and the whole, 2,928 tokens.
    "LLaVA-NeXT-34B": Target(lambda: llava_next(YI_34B), prompt=3072, slots=5),
    # The largest picture: 9 tiles and the whole, 7,371 tokens.
    "LLaVA-OneVision-7B": Target(
        lambda: llava_onevision(QWEN_7B), prompt=7424, slots=10, generate_mesh=(-1, 1, 4)
    ),
    # A picture of 896 x 896 pixels: 64 windows of 64 patches, 1,024 tokens.
    "Qwen2.5-VL-7B": Target(
        lambda: qwen_vl(QWEN_7B, 3420), prompt=1152, slots=64, generate_mesh=(-1, 1, 4)
    ),
    "Qwen2.5-VL-72B": Target(
        lambda: qwen_vl(QWEN_72B, 3456), prompt=1152, slots=64, generate_mesh=(1, -1, 8)
    ),
    # 12 tiles and the whole, 3,328 tokens.
    "InternVL3-8B": Target(
        lambda: internvl(QWEN_7B), prompt=3456, slots=13, generate_mesh=(-1, 1, 4)
    ),
}


def topology(name: str) -> list[Any]:
    """The devices of a TPU slice, "v5e:8x8" for instance, as far as the compiler is concerned."""
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def make_mesh(sizes: tuple[int, int, int], devices: list[Any]) -> Mesh:
    known = math.prod(size for size in sizes if size != -1)
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def abstract(shape: tuple[int, ...], dtype: Any, mesh: Mesh, spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def abstract_batch(
    model: Model, target: Target, mesh: Mesh, responses: int, micro_batches: bool = False
) -> Batch:
    """A batch of the target's shapes, split over the mesh; with an axis of one micro-batch."""
    b = ROWS * mesh.shape["data"] * mesh.shape["fsdp"]
    p, t, i = target.prompt, RESPONSE_TOKENS, pad_size(target.slots)
    images = model.family.images
    width = images.vectors if images else 1
    slot = images.slot_shape(model.config) if images else ()
    patches = images.describe(model.config, [], i) if images else {}
    lead, spec = ((1,), PartitionSpec(None, *BATCH)) if micro_batches else ((), BATCH)

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return abstract((*lead, b, *shape), dtype, mesh, spec)

    return Batch(
        prompt_ids=rows((p,), jnp.int32),
        prompt_mask=rows((p,), bool),
        positions=rows((model.config.decoder.rope.axes, p), jnp.int32),
        next_position=rows((), jnp.int32),
        pixel_values=rows((i, *slot), jnp.float32),
        patches={name: rows(array.shape, array.dtype) for name, array in patches.items()},
        feature_index=rows((p, width), jnp.int32),
        feature_weight=rows((p, width), jnp.float32),
        response_ids=rows((responses, t), jnp.int32),
        response_mask=rows((responses, t), bool),
        loss_mask=rows((responses, t), bool),
        weights=rows((), jnp.float32),
    )


def abstract_params(model: Model, mesh: Mesh, dtype: Any) -> Any:
    shapes = model.abstract_params()
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        shapes,
        param_shardings(shapes, model.rules, mesh),
    )


def forward(model: Model, target: Target, mesh: Mesh) -> Callable[[], Any]:
    """Log-probs of two responses, as the reference is scored."""
    score = jax.jit(lambda params, batch: response_log_probs(model, params, batch))
    params = abstract_params(model, mesh, jnp.bfloat16)
    return lambda: score.lower(params, abstract_batch(model, target, mesh, RESPONSES))


def train_step(model: Model, target: Target, mesh: Mesh) -> Callable[[], Any]:
    """A DPO step: all parameters trained, float32 with AdamW's moments, computed in bfloat16."""
    schedule = make_schedule(Optimizer(), 1000)
    optimizer = make_optimizer(Optimizer(), schedule)
    params = flatten(abstract_params(model, mesh, jnp.float32))
    moments = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
        optimizer_shardings(optimizer, params, mesh),
    )
    state = TrainState(abstract((), jnp.int32, mesh, PartitionSpec()), params, {}, moments)
    loss = make_loss(model, [make_term("dpo")], remat=REMAT)
    step = make_step(loss, optimizer, schedule, state, jnp.bfloat16)
    batch = abstract_batch(model, target, mesh, RESPONSES, micro_batches=True)
    numbers = jax.ShapeDtypeStruct(
        batch.response_ids.shape[:-1], jnp.float32, sharding=batch.response_ids.sharding
    )
    whole = jax.jit(step, donate_argnums=0)
    return lambda: whole.lower(state, TrainBatch(batch, {"sums": numbers}, {"rank": numbers}))


DECODING = Decoding(num_samples=SAMPLES, max_new_tokens=NEW_TOKENS)


def prompts_for(model: Model, target: Target, mesh: Mesh) -> tuple[Any, ...]:
    """What `prefill` is given."""
    batch = abstract_batch(model, target, mesh, 0)
    kind = jax.eval_shape(lambda: jax.random.key(0)).dtype
    keys = abstract((batch.prompt_ids.shape[0], SAMPLES), kind, mesh, BATCH)
    return model, abstract_params(model, mesh, jnp.bfloat16), batch, keys


def prefilling(model: Model, target: Target, mesh: Mesh) -> Callable[[], Any]:
    """Prompts, run once before `SAMPLES` samples of each."""
    return lambda: prefill.lower(*prompts_for(model, target, mesh))


def decoding(model: Model, target: Target, mesh: Mesh) -> Callable[[], Any]:
    """The loop that draws `NEW_TOKENS` of `SAMPLES` samples a prompt, all in a place of their own,
    with pools that hold all of them."""

    def made(function: Callable, *arguments: Any, **options: Any) -> Any:
        shapes = jax.eval_shape(functools.partial(function, **options), *arguments)
        return jax.tree.map(
            lambda leaf: abstract(leaf.shape, leaf.dtype, mesh, row_spec(leaf, mesh)), shapes
        )

    def lower() -> Any:
        _, params, *rest = prompts_for(model, target, mesh)
        new = made(functools.partial(prefill, model), params, *rest)
        rows = len(new.length)
        layout = choose_layout(rows, target.prompt, DECODING, rows, rows // ROWS)
        prompts, samples = made(
            empty_rows,
            new,
            rows=layout.rows,
            width=layout.width,
            places=layout.places,
            length=NEW_TOKENS,
            pad_id=0,
        )
        pool = made(empty_pool, new, groups=layout.groups, size=layout.members * NEW_TOKENS)
        given, wanted = (
            abstract((n,), jnp.int32, mesh, PartitionSpec()) for n in (rows, rows // ROWS)
        )
        options = {"decoding": DECODING, "eos_ids": (2,), "pad_id": 0}
        return decode.lower(model, params, prompts, samples, pool, given, wanted, **options)

    return lower


SIZES = ("arguments", "temporaries", "total")
"""Columns in GiB per chip: parameters, optimizer state and batch; what the program needs while it
runs and gives back; both and its code."""
PROGRAMS = {
    "log-probs": forward,
    "DPO step": train_step,
    "prefill": prefilling,
    "decoding": decoding,
}
"""(model, target, mesh) -> what lowers the program once the mesh is in use."""


def measure(target: Target, program: str, devices: list[Any], dump: str | None) -> dict[str, Any]:
    """Compiles one program.

    Args:
      target: the model and its shapes.
      program: one of `PROGRAMS`.
      devices: see `topology`.
      dump: file for the optimised program.

    Returns:
      The mesh, the kernels, GiB per chip, and the processor's seconds for tracing and compiling.

    Raises:
      RuntimeError: attention is not splash attention.
    """
    model = Model.create(read_config(target.config()))
    generates = program in ("prefill", "decoding")
    mesh = make_mesh(target.generate_mesh if generates else target.train_mesh, devices)
    row: dict[str, Any] = {"mesh": " x ".join(str(mesh.shape[axis]) for axis in AXES)}
    lower = PROGRAMS[program](model, target, mesh)
    with jax.set_mesh(mesh):
        started = time.process_time()
        lowered = lower()
        row["kernels"] = splash_kernels(lowered.as_text())
        if program != "decoding" and "fwd" not in row["kernels"]:
            raise RuntimeError(f"{program}: attention is not splash attention")
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            used = re.search(r"Used ([0-9.]+)G of|HLO temporaries \(([0-9.]+)G\)", str(error))
            if used is None:
                raise
            row["total"], compiled = float(used[1] or used[2]), None
        row["seconds"] = time.process_time() - started
    row["compiled"] = compiled is not None
    if compiled is None:
        return row
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # libtpu 0.0.52 cannot print v5p's
        text = compiled.as_text()
        row["kernels"] = splash_kernels(text)
        if dump:
            with open(dump, "w") as file:
                file.write(text)
    memory = compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    row["arguments"] = memory.argument_size_in_bytes / GIB
    row["temporaries"] = (memory.temp_size_in_bytes + kept) / GIB
    code = memory.generated_code_size_in_bytes / GIB
    row["total"] = row["arguments"] + row["temporaries"] + code
    return row


def splash_kernels(program: str) -> list[str]:
    """Splash attention's kernels that a program calls, lowered or compiled: "fwd", "dq", "dkv"."""
    calls = r'(?:kernel_name = "|%)splash_mha_([a-z]+)_\w+[.\d]*(?:"| = )'
    return sorted(re.findall(calls, program))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:8x8", help="as libtpu names it")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--fast", action="store_true", help="without the compiler's optimisations")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--dump", help="file for the last program's optimised HLO")
    options = parser.parse_args()
    if options.fast:
        jax.config.update("jax_optimization_level", "O0")
    memory = CHIPS[options.topology.partition(":")[0]]
    devices = topology(options.topology)
    rows = []
    print(f"| model | program | mesh | {' | '.join(SIZES)} | fits | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models:
        for program in options.programs:
            row = measure(MODELS[name], program, devices, options.dump)
            rows.append({"model": name, "name": program, **row})
            print(line(rows[-1], memory), flush=True)
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(rows, file, indent=1)


def line(row: dict[str, Any], memory: int) -> str:
    """A row of the table; without its parts where the compiler ran out of memory."""
    sizes = [f"{row[name]:.2f}" if name in row else "" for name in SIZES]
    fits = "yes" if row["compiled"] and row["total"] <= memory else "no"
    cells = [row["model"], row["name"], row["mesh"], *sizes, fits, f"{row['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
