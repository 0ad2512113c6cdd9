"""FLOPs and bytes of programs, counted from configs and shapes.

Not from the compiler, whose own counts take the body of a loop once and a kernel for nothing. And
not from what is traced: which bytes a chip reads follows from how weights are split and gathered,
which a traced program does not say yet. What is counted are products of matrices: those of
parameters, by the parameter tree itself, whatever the family; and those of attention, by what its
queries see. What is done to single numbers between them is left out: on a TPU it is a few per cent,
and fused into the products.

A shared prompt counts once, as it is run once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from mmpo_jax.core.trees import flatten
from mmpo_jax.data.amounts import seen_pairs
from mmpo_jax.generation.refill import Layout
from mmpo_jax.models.delta_rule import CHUNK
from mmpo_jax.models.flops import (
    EMBEDDING,
    HEAD,
    LAYERS,
    PER_LAYER,
    PROJECTOR,
    TOWER,
    delta_flops,
    input_gradients,
    tower_of,
)
from mmpo_jax.models.head import head_chunk
from mmpo_jax.models.layer_kinds import AttentionConfig
from mmpo_jax.models.layers import named_axes
from mmpo_jax.models.lora import EXPERTS
from mmpo_jax.models.model import Model
from mmpo_jax.parallel.mesh import batch_shards, param_shardings, placed_shapes
from mmpo_jax.planning.abstract import Sizes, shapes_of
from mmpo_jax.planning.parts import (
    Product,
    computed_pairs,
    mean_pool,
    products,
    shape_tree,
)
from mmpo_jax.planning.work import Passes, Work
from mmpo_jax.recipes.sampling import Decoding

PARAMETER_BYTES = 3 * 4
"""Bytes that an update moves for a parameter beside the optimizer's state, which is read and
written: it reads value and gradient and writes the value, each float32."""
DOWN = f"{EXPERTS}down_proj/kernel"
"""The last product of experts, behind which tokens go back to where they came from."""
MOMENT_BYTES = 2 * 4
"""Of AdamW's state."""
BACKWARD = {"splash": 3.5, "xla": 3.0}
"""FLOPs of attention's backward pass for one of the forward one, where four products of the two
would do: splash attention's two kernels both compute the scores again, plain JAX does once."""
LOGIT_MOVES = {False: 2, True: 5}
"""How often a float32 logit is written or read, without and with a backward pass."""
BETWEEN = 2.5
"""All numbers of a layer for one that a product gives: norms, rotations, gates between them."""
SCORE_BYTES = 12
"""Bytes for every score of a vision tower, which plain JAX stores: float32 written and read, and
the weights that it becomes in bfloat16."""


@dataclasses.dataclass(frozen=True)
class Computation:
    """What counting a program takes beside its products."""

    model: Model
    mesh: Mesh
    itemsize: int
    """Bytes of a number in the dtype that is computed in."""
    backend: str
    """Of attention that kernels compute: "splash" or "xla"; the other's is XLA."""

    @property
    def shards(self) -> int:
        return batch_shards(self.mesh)

    @property
    def tensor(self) -> int:
        return self.mesh.shape["tensor"]

    def ways(self, heads: int) -> int:
        """Over how many devices of `tensor` so many heads are split."""
        return self.tensor if heads % self.tensor == 0 else 1

    def params(self) -> dict[str, Any]:
        """The parameters' shapes on the mesh, by path."""
        return flatten(placed_shapes(shapes_of(self.model), self.model.rules, self.mesh))

    def product(self, product: Product, passes: Passes) -> Work:
        """One product in its passes. Parameters that are split over `fsdp`, and `expert` if there
        is one, are gathered for every pass that reads them, and their gradients added up over all
        rows, by reduce-scatter over these and by all-reduce over `data`."""
        inputs, outputs = product.split
        over = self.tensor if "tensor" in product.split else 1
        axes = [axis for entry in product.split for axis in named_axes(entry) if axis != "tensor"]
        tokens = product.tokens / self.shards
        # Of few tokens not every expert has one.
        experts = min(product.experts / product.expert, product.active * tokens)
        kernel = product.layers * experts * product.inputs * product.outputs * self.itemsize / over
        rows = product.layers * product.active * tokens
        x, y = (
            rows * width / (self.tensor if axis == "tensor" else 1)
            for width, axis in ((product.inputs, inputs), (product.outputs, outputs))
        )
        reads = passes.forward + passes.inputs
        fsdp = math.prod(self.mesh.shape[axis] for axis in axes)
        moved = kernel * (reads * (2 if fsdp > 1 else 1) + passes.weights)
        moved += (x + y) * self.itemsize * passes.computed
        sent = reads * kernel * (fsdp - 1) / fsdp
        sent += passes.weights * self._summed(kernel, fsdp, self.shards // fsdp // product.expert)
        if product.path.endswith(DOWN):
            # What experts make of a token is added up before it is sent.
            y *= product.expert / product.active
            exchanged = (product.expert - 1) * product.layers * tokens * product.outputs
            sent += reads * 2 * exchanged * self.itemsize
        if inputs == "tensor":  # each has a part of every sum
            share = 2 * (self.tensor - 1) / self.tensor
            sent += reads * share * y * self.itemsize
        flops = product.flops
        return Work(flops * passes.computed, flops * passes.needed, moved, sent)

    def _summed(self, size: float, fsdp: int, others: int) -> float:
        """Bytes that a device sends for the sum of a gradient over all rows, of which it keeps one
        of `fsdp` parts, as so many others do."""
        return size * (fsdp - 1) / fsdp + 2 * size / fsdp * (others - 1) / others

    def attention(self, sizes: Sizes, passes: Passes) -> Work:
        """The decoder's attention over prompts and responses."""
        alike = collections.Counter(self.model.config.decoder.attentions)
        works = (self._attention(*layers, sizes, passes) for layers in alike.items())
        return functools.reduce(operator.add, works)

    def _attention(
        self, attention: AttentionConfig, layers: int, sizes: Sizes, passes: Passes
    ) -> Work:
        pair = 4.0 * layers * attention.num_heads * attention.head_dim * sizes.rows
        backend = self.backend if attention.in_kernels else "xla"
        backward = BACKWARD[backend] if passes.inputs else 0.0
        computed = computed_pairs(sizes, backend, attention.window or None)
        flops = pair * computed * (passes.forward + backward)
        seen = seen_pairs(sizes.prompt, [sizes.response] * sizes.responses)
        needed = pair * seen * (1 + 2 * passes.inputs)
        heads = 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        rows = sizes.tokens / self.shards / self.tensor
        moved = layers * rows * heads * self.itemsize
        return Work(flops, needed, moved * (passes.forward + 2.5 * passes.inputs))

    def states(self, sizes: Sizes, passes: Passes) -> Work:
        """The decoder's delta nets: a state for every chunk of tokens, and products within it."""
        flops, needed, moved = 0.0, 0.0, 0.0
        for net in self.model.config.decoder.delta_nets:
            width = 2 * net.key_dim + 2 * net.value_dim
            within = 2.0 * CHUNK * net.num_value_heads * width
            flops += sizes.tokens * (6.0 * net.state_size + within)
            needed += sizes.tokens * 6.0 * net.state_size
            rows = sizes.tokens / self.shards / self.ways(net.num_value_heads)
            moved += 4 * rows * (2 * net.state_size / CHUNK + net.num_value_heads * width)
        return Work(
            flops * (passes.forward + 3 * passes.inputs),  # which computes them again
            needed * (1 + 2 * passes.inputs),
            moved * (passes.forward + 3 * passes.inputs),
        )

    def tower(self, sizes: Sizes, passes: Passes) -> Work:
        """Attention in the vision tower, whose scores are stored."""
        tower = tower_of(self.model.config)
        if tower is None or not sizes.padded_slots:
            return Work(0, 0, 0)
        pairs = sizes.rows * tower.scores(sizes.padded_slots)
        flops = 4.0 * tower.width * pairs
        backward = BACKWARD["xla"] * passes.inputs
        moved = SCORE_BYTES * tower.heads * pairs / self.shards / self.tensor
        return Work(
            flops * (passes.forward + backward),
            flops * (1 + 2 * passes.inputs),
            moved * (passes.forward + 2 * passes.inputs),
        )

    def head(self, product: Product, sizes: Sizes, passes: Passes) -> Work:
        """The language-model head over responses, chunk by chunk: every device has its part of
        the vocabulary and the rows of all that share `fsdp`."""
        rows, data = product.tokens / max(1, sizes.response), self.mesh.shape["data"]
        with jax.set_mesh(self.mesh):
            chunk = head_chunk(int(rows), sizes.response, product.inputs, product.outputs)
        over = self.mesh.size // data
        kernel = product.size / over * self.itemsize
        logits = product.tokens / data * product.outputs / over * 4
        hidden = product.tokens / data * product.inputs * self.itemsize
        chunks = -(-sizes.response // chunk)
        moved = chunks * kernel * passes.computed
        moved += LOGIT_MOVES[bool(passes.inputs)] * logits + hidden * passes.computed
        sent = hidden * (over - 1) / over * passes.computed
        return Work(product.flops * passes.computed, product.flops * passes.needed, moved, sent)


def forward_work(
    computation: Computation,
    sizes: Sizes,
    *,
    head: bool = True,
    last_only: bool = False,
    head_passes: int = 1,
) -> Work:
    """A pass without gradients: the reference, scoring, held-out rows, prompts, questions.

    Args:
      computation: of which model, where.
      sizes: of the batch.
      head: whether logits of the responses are computed.
      last_only: of their last tokens alone.
      head_passes: how often they are computed.
    """
    of_head = Passes(head_passes)
    per_response = 1 if last_only else sizes.response
    tokens = sizes.rows * sizes.responses * per_response if head else 0
    flat = computation.params()

    def passes(path: str) -> Passes:
        return of_head if path in (HEAD, EMBEDDING) else Passes()

    return _passed(computation, flat, sizes, tokens, passes, Passes(), Passes())


def train_work(
    computation: Computation,
    params: Mapping[str, Any],
    trained: Collection[str],
    sizes: Sizes,
    micro_batches: int,
    remat: str,
    reference: bool = False,
    moments: float | None = None,
) -> Work:
    """One update.

    Args:
      computation: of which model, where.
      params: path -> shapes, with adapters where there are any.
      trained: paths of what is trained.
      sizes: of a micro-batch.
      micro_batches: of the batch.
      remat: the recipe's policy.
      reference: whether a reference runs in the step.
      moments: bytes of the optimizer's state that a device holds; AdamW's by default.
    """
    again = 2 if remat == "full" else 1
    below = input_gradients(trained)

    def passes(path: str) -> Passes:
        beginning = LAYERS if path.startswith(PER_LAYER) else path
        part = next((part for part in below if beginning.startswith(part)), None)
        if part is None:  # the head, whose chunks are computed again
            inputs = below[LAYERS]
            return Passes(2, int(inputs), int(path in trained))
        forward = again if below[part] and part != PROJECTOR else 1
        return Passes(forward, int(below[part]), int(path in trained))

    head = sizes.rows * sizes.responses * sizes.response
    inner = passes(LAYERS)
    of_tower = passes(TOWER)
    micro = _passed(computation, params, sizes, head, passes, inner, of_tower)
    if reference:
        base = computation.params()
        micro += _passed(computation, base, sizes, head, lambda _: Passes(), Passes(), Passes())
    own = sum(math.prod(params[path].shape) / _ways(computation, params, path) for path in trained)
    gathered = 2 * 4 * own if micro_batches > 1 else 0.0
    state = MOMENT_BYTES * own if moments is None else moments
    update = PARAMETER_BYTES * own + 2 * state + micro_batches * gathered
    return micro.times(micro_batches) + Work(0, 0, update)


def kept_bytes(
    computation: Computation,
    params: Mapping[str, Any],
    trained: Collection[str],
    sizes: Sizes,
    remat: str,
) -> float:
    """Bytes that a device keeps of a micro-batch for the backward pass, roughly: gradients, and of
    the decoder's layers their inputs, what their products give, or all that lies between."""
    decoder = computation.model.config.decoder
    tokens = sizes.tokens / computation.shards * computation.itemsize
    own = sum(math.prod(params[path].shape) / _ways(computation, params, path) for path in trained)
    inputs = decoder.num_layers * decoder.hidden_size * tokens
    given = sum(
        product.layers
        * product.active
        * product.outputs
        / (computation.tensor if product.split[1] else 1)
        * tokens
        for product in products(
            computation.model, params, computation.mesh, decoder=1, head=0, slots=0
        )
    )
    share = {"full": 0.0, "dots": 1.0, "none": BETWEEN}[remat]
    return 4 * own + inputs + share * given


def _ways(computation: Computation, params: Mapping[str, Any], path: str) -> int:
    """Over how many devices a parameter is split."""
    tree = shape_tree({path: params[path]})
    (sharding,) = flatten(param_shardings(tree, computation.model.rules, computation.mesh)).values()
    shape = params[path].shape
    return math.prod(shape) // math.prod(sharding.shard_shape(shape))


def _passed(
    computation: Computation,
    params: Mapping[str, Any],
    sizes: Sizes,
    head: float,
    passes: Callable[[str], Passes],
    attention: Passes,
    tower: Passes,
) -> Work:
    slots = sizes.rows * sizes.padded_slots
    work = Work(0, 0, 0)
    for product in products(
        computation.model, params, computation.mesh, decoder=sizes.tokens, head=head, slots=slots
    ):
        if product.path in (HEAD, EMBEDDING):
            work += computation.head(product, sizes, passes(product.path))
        else:
            work += computation.product(product, passes(product.path))
    work += computation.attention(sizes, attention) + computation.states(sizes, attention)
    return work + computation.tower(sizes, tower)


def decode_work(computation: Computation, layout: Layout, prompt: int, decoding: Decoding) -> Work:
    """One token of every place, in the mean over samples as long as their limit: weights are read
    once, and of every row the caches of its prompts and of the tokens sampled so far."""
    decoder = computation.model.config.decoder
    places = layout.rows * layout.places
    params = computation.params()
    work = Work(0, 0, 0)
    for product in products(
        computation.model, params, computation.mesh, decoder=places, head=places, slots=0
    ):
        work += computation.product(product, Passes())
    pool = layout.members * mean_pool(decoding.max_new_tokens)
    keys = layout.width * prompt + pool
    flops = 4.0 * decoder.query_channels * places * keys
    cached = layout.rows * (layout.width * prompt + layout.groups * pool)
    heads = sum(
        2 * attention.num_kv_heads * attention.head_dim / computation.ways(attention.num_kv_heads)
        for attention in decoder.attentions
    )
    moved = cached * heads * computation.itemsize / computation.shards
    flops += delta_flops(decoder) * places
    for net in decoder.delta_nets:  # states are read and written
        over = computation.shards * computation.ways(net.num_value_heads)
        moved += 2 * 4 * places * net.state_size / over
    return work + Work(flops, flops, moved)
