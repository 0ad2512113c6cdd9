"""Sizes and switches of the shared building blocks, read from Hugging Face configs.

transformers resolves the defaults that a `config.json` leaves out; the dataclasses here keep only
what the forward pass reads, and refuse what it does not implement. What one architecture adds to
them is in its file under `families/`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.sections import CritiqueLayout
from mmpo_jax.models.layer_kinds import (
    AttentionConfig,
    DeltaNetConfig,
    ExpertsConfig,
    LayerConfig,
    MlpConfig,
    PerLayerConfig,
    Segment,
    Stack,
    segments_of,
)
from mmpo_jax.models.layers import ACTIVATIONS
from mmpo_jax.models.rope import Rope, read_rope


class ModelError(MmpoError):
    """A checkpoint folder this library cannot run, or weights that do not fit its config."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of layers that may differ: Llama, Mistral, Qwen2, Qwen3 and their kin."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    tie_word_embeddings: bool
    norm_offset: bool = False
    """Whether norms multiply by 1 + their scale (Gemma)."""
    embedding_scale: float = 1.0
    """Factor of token embeddings."""
    softcap: float | None = None
    """What logits are kept below, see `attention.capped`; None for no limit."""
    language_head: bool = True
    """Whether there is a language-model head; transformers' sequence classification has none."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return segments_of(self.layers)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of all segments."""
        return tuple(stack for segment in self.segments for stack in segment.stacks)

    @property
    def per_layer(self) -> PerLayerConfig | None:
        """Of the embedding that all layers have parts of; None where there is none."""
        return self.layers[0].per_layer

    def kv_source(self, stack: Stack) -> Stack:
        """The stack whose keys and values the layers of this one read: its own, or that of a layer
        that is a stack by itself."""
        mixer = stack.layer.mixer
        number = mixer.kv_source if isinstance(mixer, AttentionConfig) else None
        return stack if number is None else next(s for s in self.stacks if number in s.numbers)

    @property
    def attentions(self) -> tuple[AttentionConfig, ...]:
        """Of every layer that has attention."""
        mixers = (layer.mixer for layer in self.layers)
        return tuple(mixer for mixer in mixers if isinstance(mixer, AttentionConfig))

    @property
    def experts(self) -> tuple[ExpertsConfig, ...]:
        """Of every layer that has some."""
        parts = (part for layer in self.layers for part in (layer.mlp, layer.experts))
        return tuple(part for part in parts if isinstance(part, ExpertsConfig))

    @property
    def delta_nets(self) -> tuple[DeltaNetConfig, ...]:
        """Of every layer that has one."""
        mixers = (layer.mixer for layer in self.layers)
        return tuple(mixer for mixer in mixers if isinstance(mixer, DeltaNetConfig))

    @property
    def in_kernels(self) -> bool:
        """Whether kernels compute the attention of any layer."""
        return any(attention.in_kernels for attention in self.attentions)

    @property
    def sees_images(self) -> bool:
        """Whether there are layers in which an image sees all of itself."""
        return any(attention.sees_images for attention in self.attentions)

    @property
    def query_channels(self) -> int:
        """Of all heads of all layers that have attention."""
        return sum(attention.num_heads * attention.head_dim for attention in self.attentions)

    @property
    def position_axes(self) -> int:
        """A: how many positions a token has."""
        return max(attention.rope.axes for attention in self.attentions)

    @property
    def position_limit(self) -> int | None:
        """How many tokens the rotary frequencies hold for; None for any number."""
        limits = [attention.rope.limit for attention in self.attentions]
        return min((limit for limit in limits if limit is not None), default=None)


HeadKind = Literal["linear", "two_layer"]


@dataclasses.dataclass(frozen=True)
class RewardHead:
    """A head that says what a response is worth, see `models.reward_head`."""

    kind: HeadKind
    critique_prompt: str | None = None
    """What the user says behind a response, upon which the model writes the critique that its head
    reads too; None for a head that reads the response alone."""
    critique_layout: CritiqueLayout = "turns"
    """With `one_turn` that prompt holds {question} and {response}, and stands in their place."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What every architecture has; families with images extend it."""

    family: str
    """config.json's `model_type`."""
    decoder: DecoderConfig
    reward_head: RewardHead | None = dataclasses.field(default=None, kw_only=True)
    """Head of a reward model; None for a model that only speaks."""


DECODER_TYPES = (
    "llama",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
)


def read_decoder(text: Any, tied: bool, key: str = "text_config") -> DecoderConfig:
    """The decoder of a transformers text config.

    Args:
      text: a `transformers` config of one of `DECODER_TYPES`.
      tied: whether the head is the token embedding; VLM configs say so outside of `text`.
      key: how error messages call the config.

    Raises:
      ModelError: an architecture, rope type or switch that is not implemented.
    """
    kind = text.model_type
    expect(kind, DECODER_TYPES, f"{key}.model_type")
    expect(text.hidden_act, tuple(ACTIVATIONS), f"{key}.hidden_act")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Qwen2's biases are part of the architecture; the others state theirs.
    is_qwen2 = kind in ("qwen2", "qwen2_5_vl_text")
    bias = bool(getattr(text, "attention_bias", False))
    try:
        rope = read_rope(text.rope_parameters, head_dim, text.max_position_embeddings)
    except ValueError as error:
        raise ModelError(f"{key}.rope_parameters: {error}") from error
    query_rope = _query_rope(text, rope, key) if kind == "ministral3" else None
    mlps = _mlps(text)

    def layer(window: int, mlp: MlpConfig | ExpertsConfig) -> LayerConfig:
        name = "sliding_attention" if window else "full_attention"
        if len(set(mlps)) > 1:
            name += "_sparse" if isinstance(mlp, ExpertsConfig) else "_dense"
        attention = AttentionConfig(
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            rope=rope,
            scale=head_dim**-0.5,
            window=window,
            softcap=None,
            qkv_bias=is_qwen2 or bias,
            out_bias=bias and not is_qwen2,
            qk_norm=kind.startswith("qwen3"),
            query_rope=query_rope,
        )
        return LayerConfig(name, attention, mlp)

    return DecoderConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        layers=tuple(map(layer, _windows(text), mlps)),
        rms_norm_eps=text.rms_norm_eps,
        tie_word_embeddings=bool(tied),
    )


def _query_rope(text: Any, rope: Rope, key: str) -> Rope:
    """Queries grow with the number of original lengths that they are behind."""
    names = "llama_4_scaling_beta", "original_max_position_embeddings"
    growth, length = (text.rope_parameters.get(name) for name in names)
    if growth is None or not length:
        raise ModelError(f"{key}.rope_parameters has no {names[0]}, or no {names[1]}")
    return dataclasses.replace(rope, growth=(growth, length))


def _mlps(text: Any) -> list[MlpConfig | ExpertsConfig]:
    """Of every layer."""
    act, depth = text.hidden_act, text.num_hidden_layers
    dense = MlpConfig(text.intermediate_size, act, bool(getattr(text, "mlp_bias", False)))
    if not getattr(text, "num_experts", 0):
        return [dense] * depth
    experts = ExpertsConfig(
        num_experts=text.num_experts,
        top_k=text.num_experts_per_tok,
        intermediate_size=text.moe_intermediate_size,
        hidden_act=act,
        # Qwen3-VL's are normalised whatever a config says, in transformers too.
        normalised=text.model_type == "qwen3_vl_moe_text" or text.norm_topk_prob,
    )
    step, without = text.decoder_sparse_step, text.mlp_only_layers
    return [
        experts if (number + 1) % step == 0 and number not in without else dense
        for number in range(depth)
    ]


def with_rope(decoder: DecoderConfig, rope: Rope) -> DecoderConfig:
    """The decoder with another rotary embedding in all layers, of which each has attention."""
    layers = (
        dataclasses.replace(layer, mixer=dataclasses.replace(attention, rope=rope))
        for layer, attention in zip(decoder.layers, decoder.attentions, strict=True)
    )
    return dataclasses.replace(decoder, layers=tuple(layers))


def _windows(text: Any) -> tuple[int, ...]:
    window = getattr(text, "sliding_window", None) or 0
    kinds = getattr(text, "layer_types", None)
    if kinds is None or text.model_type in ("mistral", "ministral3"):  # which read none
        return (window,) * text.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def expect(value: Any, known: tuple[Any, ...], key: str) -> None:
    """
    Raises:
      ModelError: the value of `key` is none of the known ones.
    """
    if value not in known:
        raise ModelError(
            f"{key} is {value!r}; this version implements {', '.join(map(str, known))}"
        )
