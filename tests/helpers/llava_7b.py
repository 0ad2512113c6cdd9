"""LLaVA-1.5-7B by its config, and what a count by hand needs of it."""

import functools

import transformers

from mmpo_jax.models.model import Model, read_config

LAYERS, WIDTH, WIDE, VOCABULARY = 32, 4096, 11008, 32064
BODY = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * WIDE)
"""Weights of the decoder's layers."""
TOWER = 23 * (4 * 1024**2 + 2 * 1024 * 4096)
"""Weights of the layers of the vision tower whose states are read."""
PROJECTOR = 1024 * WIDTH + WIDTH**2


@functools.cache
def llava_7b():
    """The model without parameters."""
    return Model.create(
        read_config(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    image_size=336,
                    patch_size=14,
                ),
                text_config=transformers.LlamaConfig(
                    hidden_size=WIDTH,
                    intermediate_size=WIDE,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=32,
                    num_key_value_heads=32,
                    vocab_size=VOCABULARY,
                ),
                image_token_index=32000,
                tie_word_embeddings=False,
            )
        )
    )
