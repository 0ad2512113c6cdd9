"""What layers of a decoder are, and how those that are alike lie together.

Parameters of like layers are stacked, so that a scan runs them with a body that is compiled once.
A decoder whose layers are all alike is one stack. One of unlike layers is a few segments, each a
pattern of runs of like layers that is repeated: `6 x (5 sliding, 1 full)` and a rest of
`1 x (2 sliding)`. Every run of a pattern is a stack: of all repeats, one behind the other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from mmpo_jax.models.rope import Rope

LAYERS = "layers"
"""Where stacks lie in the decoder: the only one here, else each under its own name."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention of a layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    scale: float
    """Factor of the scores."""
    window: int
    """Number of tokens that a query sees, itself included; 0 for all."""
    softcap: float | None
    """c of c tanh(score / c) in place of a score (Gemma 2, arXiv 2408.00118, section 2); None for
    the score itself."""
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    """Whether queries and keys are normalised per head (Qwen3)."""
    gated: bool = False
    """Whether what heads read is multiplied by a gate, which `q_proj` makes too (Qwen3-Next)."""
    value_norm: bool = False
    """Whether values are, by a norm without a scale (Gemma 4)."""
    keys_are_values: bool = False
    """Whether values are what keys are made of, before their norm and rotation (Gemma 4)."""
    sees_images: bool = False
    """Whether tokens of an image see all others of it, the later ones too (Gemma 3)."""
    query_rope: Rope | None = None
    """Of queries, where theirs is not that of keys (Ministral 3)."""
    is_kv_source: bool = False
    """Whether later layers read its keys and values (Gemma 3n)."""
    kv_source: int | None = None
    """Number of the layer whose keys and values it reads; None for its own."""

    @property
    def ropes(self) -> tuple[Rope, Rope]:
        """Of queries and of keys."""
        return self.query_rope or self.rope, self.rope

    @property
    def scores(self) -> dict[str, Any]:
        """Who sees whom and how much: keyword arguments of the functions in `attention`."""
        return {
            "window": self.window or None,
            "scale": self.scale,
            "softcap": self.softcap,
            "sees_images": self.sees_images,
        }

    @property
    def in_kernels(self) -> bool:
        """Whether kernels compute it: they know who sees whom by place alone."""
        return not self.window and not self.sees_images


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
    """A gated delta net, see `delta_net`."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    """Channels of a key head."""
    value_dim: int
    conv_size: int
    """Tokens that the convolution sees, the token itself included."""
    hidden_act: str
    """Behind the convolution."""

    @property
    def channels(self) -> int:
        """What the convolution reads: queries, keys and values of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def state_size(self) -> int:
        """Numbers of the state, of all heads."""
        return self.num_value_heads * self.key_dim * self.value_dim


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """A dense layer with a gate, see `layers.GatedMlp`."""

    intermediate_size: int
    hidden_act: str
    bias: bool


@dataclasses.dataclass(frozen=True)
class PerLayerConfig:
    """An embedding of tokens that every layer has a part of (Gemma 3n)."""

    size: int
    """Channels of a layer's part."""
    vocab_size: int
    pad_id: int
    """The token that stands there for features of images."""


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A router and experts, in place of one MLP (`experts.SparseMlp`) or beside it."""

    num_experts: int
    top_k: int
    """Experts that a token passes."""
    intermediate_size: int
    """Of one expert."""
    hidden_act: str
    normalised: bool
    """Whether the shares of a token's experts add up to 1."""
    shared_size: int = 0
    """Intermediate size of the expert that all tokens pass; 0 where there is none."""


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One layer: how its tokens read one another, and what is made of each."""

    name: str
    """What layers of this kind are called where not all are alike: transformers' `layer_types`."""
    mixer: AttentionConfig | DeltaNetConfig
    mlp: MlpConfig | ExpertsConfig
    sandwich: bool = False
    """Whether what mixer and MLP add to the residual stream is normalised too (Gemma 2)."""
    experts: ExpertsConfig | None = None
    """Experts beside the MLP of a layer with `sandwich`, each with norms of its own (Gemma 4)."""
    per_layer: PerLayerConfig | None = None
    """Of the embedding that a layer with `sandwich` reads behind its MLP; None for none."""
    scaled: bool = False
    """Whether a number that is not trained scales what comes out (Gemma 4)."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """A run of like layers in the pattern of a segment, of all repeats."""

    path: str
    """Where its parameters lie in the decoder: `layers`, or `layers/NAME`."""
    layer: LayerConfig
    count: int
    """Layers of the run in one repeat."""
    numbers: tuple[int, ...]
    """Which layers of the decoder these are, in their order."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A pattern of runs of like layers, and how often it is repeated."""

    repeats: int
    stacks: tuple[Stack, ...]


@functools.cache
def segments_of(layers: tuple[LayerConfig, ...]) -> tuple[Segment, ...]:
    """The segments of a decoder: the fewest stacks, of those the fewest segments, and of those the
    most layers in the first one."""
    best: list[tuple[int, int, tuple[tuple[int, int, int], ...]]] = [(0, 0, ())]
    depth = len(layers)
    for start in range(depth - 1, -1, -1):  # best[0] is that of layers[start + 1:]
        found = []
        for period in range(1, depth - start + 1):
            pattern = layers[start : start + period]
            if len({_reads_others(layer) for layer in pattern}) > 1:
                break  # what they read comes out of an earlier segment
            runs = sum(1 for _ in itertools.groupby(pattern))
            repeats = 0
            while layers[start + repeats * period :][:period] == pattern:
                repeats += 1
                stacks, segments, rest = best[start + repeats * period - start - 1]
                first = (start, period, repeats)
                found.append((stacks + runs, segments + 1, (first, *rest)))
        best.insert(0, min(found, key=_preference))
    return _named(layers, best[0][2])


def _reads_others(layer: LayerConfig) -> bool:
    return isinstance(layer.mixer, AttentionConfig) and layer.mixer.kv_source is not None


def _preference(found: tuple[int, int, tuple[tuple[int, int, int], ...]]) -> tuple[int, ...]:
    stacks, segments, ((_, period, repeats), *_) = found
    return stacks, segments, -period * repeats, period


def _named(
    layers: tuple[LayerConfig, ...], cuts: tuple[tuple[int, int, int], ...]
) -> tuple[Segment, ...]:
    """Segments of (first layer, layers of the pattern, repeats)."""
    is_alike = len(set(layers)) == 1
    seen: dict[str, int] = {}

    def path(name: str) -> str:
        if is_alike:
            return LAYERS
        seen[name] = seen.get(name, 0) + 1
        return f"{LAYERS}/{name}" + (f"_{seen[name]}" if seen[name] > 1 else "")

    segments = []
    for start, period, repeats in cuts:
        stacks, first = [], start
        for layer, run in itertools.groupby(layers[start : start + period]):
            count = len(list(run))
            numbers = [first + r * period + i for r in range(repeats) for i in range(count)]
            stacks.append(Stack(path(layer.name), layer, count, tuple(numbers)))
            first += count
        if len(stacks) == 1:  # a pattern of one run is the run
            (stack,) = stacks
            stacks, repeats = [dataclasses.replace(stack, count=len(stack.numbers))], 1
        segments.append(Segment(repeats, tuple(stacks)))
    return tuple(segments)
