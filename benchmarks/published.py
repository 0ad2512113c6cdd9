"""Published models by their configs, for plans and measurements that need no weights.

    python benchmarks/published.py LLaVA-1.5-7B models/llava-1.5-7b

writes the config of a model, with its image processor's settings and a stand-in of its tokenizer:
what `mmpo plan` takes. Where there is a network, the hub id does the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model."""

    config: Callable[[], Any]
    """Makes the transformers config, from the values of its config.json."""
    image_processor: Any = None
    media: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tokens that stand for media and around them, with their ids."""
    named: dict[str, str] = dataclasses.field(default_factory=dict)
    """Names under which tokenizer_config.json has some of them."""
    picture: str = "<image>"
    """What the chat template writes for a picture."""


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
QWEN3_8B = decoder(4096, 12288, 36, 32, 8, 151936, 1e6, head_dim=128)
QWEN3_30B_A3B = decoder(
    *(2048, 6144, 48, 32, 4, 151936, 1e6),
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
)
LLAMA_3_8B = decoder(4096, 14336, 32, 32, 8, 128256, 5e5)
NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_GRIDS = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]


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
        image_grid_pinpoints=NEXT_GRIDS,
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
        image_grid_pinpoints=ONEVISION_GRIDS,
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
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=False,
    )


def qwen3_vl(kind: Any, text: dict[str, Any]) -> Any:
    sections = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    return kind(
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        text_config={k: v for k, v in text.items() if k != "norm_topk_prob"}
        | {"rope_parameters": sections},
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=False,
    )


def internvl3(text: dict[str, Any]) -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    text = text | {"vocab_size": 151674, "rope_parameters": rope}
    return internvl(transformers.Qwen2Config(**text), 151667)


def internvl(text: Any, image_token: int) -> Any:
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
        text_config=text,
        image_token_id=image_token,
        tie_word_embeddings=False,
    )


def qwen3_5(text: dict[str, Any], kind: Any = transformers.Qwen3_5Config) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10]}
    rope |= {"partial_rotary_factor": 0.25, "mrope_interleaved": True}
    return kind(
        vision_config={"out_hidden_size": text["hidden_size"]},
        text_config=text | {"rope_parameters": rope, "head_dim": 256},
        tie_word_embeddings=False,
    )


def gemma4(layers: int, vision: Any = (), **shape: Any) -> Any:
    return transformers.Gemma4Config(
        text_config={
            "num_hidden_layers": layers,
            "head_dim": 256,
            "global_head_dim": 512,
            "attention_k_eq_v": True,
            "vocab_size": 262144,
            "sliding_window": 1024,
            "final_logit_softcapping": 30.0,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
            **shape,
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 72,
            "standardize": True,
            **dict(vision),
        },
    )


SHORTEST = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
OF_CLIP = transformers.CLIPImageProcessorPil(**SHORTEST)
OF_ONEVISION = transformers.LlavaOnevisionImageProcessorPil(
    size={"height": 384, "width": 384}, image_grid_pinpoints=ONEVISION_GRIDS
)
OF_INTERNVL = transformers.GotOcr2ImageProcessorPil(
    size={"height": 448, "width": 448}, min_patches=1, max_patches=12
)
QWEN_SETTINGS = {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
OF_QWEN = transformers.Qwen2VLImageProcessorPil(**QWEN_SETTINGS)
OF_QWEN3 = transformers.Qwen2VLImageProcessorPil(
    patch_size=16, size={"shortest_edge": 256 * 256, "longest_edge": 32 * 32 * 1280}
)
QWEN_MEDIA = {
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
QWEN_PICTURE = "<|vision_start|> <|image_pad|> <|vision_end|>"
QWEN3_5_27B = decoder(5120, 17408, 64, 24, 4, 248320, 1e7, linear_num_value_heads=48)
QWEN3_5_35B_A3B = decoder(
    *(2048, 0, 40, 16, 2, 248320, 1e7),
    num_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
)
OF_QWEN3_5 = transformers.Qwen2VLImageProcessorPil(
    patch_size=16, size={"shortest_edge": 2**16, "longest_edge": 2**20}
)
QWEN3_5_MEDIA = {
    "<|vision_start|>": 248053,
    "<|vision_end|>": 248054,
    "<|image_pad|>": 248056,
    "<|video_pad|>": 248057,
}
INTERNVL_NAMES = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
INTERNVL_MEDIA = {"<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667, "<video>": 151668}
INTERNVL35_MEDIA = {
    "<img>": 151669,
    "</img>": 151670,
    "<IMG_CONTEXT>": 151671,
    "<video>": 151678,
}
GEMMA4_SMALL_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "standardize": False,
    "use_clipped_linears": True,
}
OF_GEMMA4 = transformers.Gemma4ImageProcessorPil()
GEMMA4_MEDIA = {"<|image>": 255999, "<|image|>": 258880, "<image|>": 258882}
GEMMA4_NAMES = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}

PUBLISHED = {
    "LLaVA-1.5-7B": Published(lambda: llava(VICUNA_7B), OF_CLIP, {"<image>": 32000}),
    "LLaVA-1.5-13B": Published(lambda: llava(VICUNA_13B), OF_CLIP, {"<image>": 32000}),
    "LLaVA-NeXT-34B": Published(
        lambda: llava_next(YI_34B),
        transformers.LlavaNextImageProcessorPil(**SHORTEST, image_grid_pinpoints=NEXT_GRIDS),
        {"<image>": 64000},
    ),
    "LLaVA-OneVision-7B": Published(
        lambda: llava_onevision(QWEN_7B), OF_ONEVISION, {"<image>": 151646, "<video>": 151647}
    ),
    "Qwen2.5-VL-7B": Published(
        lambda: qwen_vl(QWEN_7B, 3420), OF_QWEN, QWEN_MEDIA, picture=QWEN_PICTURE
    ),
    "Qwen2.5-VL-72B": Published(
        lambda: qwen_vl(QWEN_72B, 3456), OF_QWEN, QWEN_MEDIA, picture=QWEN_PICTURE
    ),
    "Qwen3-VL-8B": Published(
        lambda: qwen3_vl(transformers.Qwen3VLConfig, QWEN3_8B),
        OF_QWEN3,
        QWEN_MEDIA,
        picture=QWEN_PICTURE,
    ),
    "Qwen3-VL-30B-A3B": Published(
        lambda: qwen3_vl(transformers.Qwen3VLMoeConfig, QWEN3_30B_A3B),
        OF_QWEN3,
        QWEN_MEDIA,
        picture=QWEN_PICTURE,
    ),
    "InternVL3-8B": Published(
        lambda: internvl3(QWEN_7B),
        OF_INTERNVL,
        INTERNVL_MEDIA,
        INTERNVL_NAMES,
        picture="<IMG_CONTEXT>",
    ),
    "InternVL3.5-8B": Published(
        lambda: internvl(transformers.Qwen3Config(**QWEN3_8B), 151671),
        OF_INTERNVL,
        INTERNVL35_MEDIA,
        INTERNVL_NAMES,
        picture="<IMG_CONTEXT>",
    ),
    "InternVL3.5-30B-A3B": Published(
        lambda: internvl(transformers.Qwen3MoeConfig(**QWEN3_30B_A3B), 151671),
        OF_INTERNVL,
        INTERNVL35_MEDIA,
        INTERNVL_NAMES,
        picture="<IMG_CONTEXT>",
    ),
    "Qwen3-30B-A3B": Published(lambda: transformers.Qwen3MoeConfig(**QWEN3_30B_A3B)),
    "Qwen3.5-27B": Published(
        lambda: qwen3_5(QWEN3_5_27B), OF_QWEN3_5, QWEN3_5_MEDIA, picture=QWEN_PICTURE
    ),
    "Qwen3.5-35B-A3B": Published(
        lambda: qwen3_5(QWEN3_5_35B_A3B, transformers.Qwen3_5MoeConfig),
        OF_QWEN3_5,
        QWEN3_5_MEDIA,
        picture=QWEN_PICTURE,
    ),
    "Gemma-4-E2B": Published(
        lambda: gemma4(
            35,
            vision=GEMMA4_SMALL_TOWER,
            hidden_size=1536,
            intermediate_size=6144,
            num_attention_heads=8,
            num_key_value_heads=1,
            attention_k_eq_v=False,
            sliding_window=512,
            layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
            hidden_size_per_layer_input=256,
            num_kv_shared_layers=20,
            use_double_wide_mlp=True,
            use_bidirectional_attention=None,
        ),
        OF_GEMMA4,
        GEMMA4_MEDIA,
        GEMMA4_NAMES,
        picture="<|image|>",
    ),
    "Gemma-4-26B-A4B": Published(
        lambda: gemma4(
            30,
            hidden_size=2816,
            intermediate_size=2112,
            num_attention_heads=16,
            num_key_value_heads=8,
            num_global_key_value_heads=2,
            enable_moe_block=True,
            num_experts=128,
            top_k_experts=8,
            moe_intermediate_size=704,
        ),
        OF_GEMMA4,
        GEMMA4_MEDIA,
        GEMMA4_NAMES,
        picture="<|image|>",
    ),
    "Gemma-4-31B": Published(
        lambda: gemma4(
            60,
            hidden_size=5376,
            intermediate_size=21504,
            num_attention_heads=32,
            num_key_value_heads=16,
            num_global_key_value_heads=4,
        ),
        OF_GEMMA4,
        GEMMA4_MEDIA,
        GEMMA4_NAMES,
        picture="<|image|>",
    ),
    # RLAIF-V's splitters are tuned from it.
    "Llama-3-8B": Published(lambda: transformers.LlamaConfig(**LLAMA_3_8B)),
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% if m['content'] is string %}{{ m['content'] + ' ' }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% else %}PICTURE {% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def write_folder(name: str, folder: str | Path) -> None:
    """Config, image processor and a word-level stand-in of the tokenizer."""
    model, folder = PUBLISHED[name], Path(folder)
    config = model.config()
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    words = ("<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:", "yes", "Yes", "no", "No", "?")
    vocabulary = {word: number for number, word in enumerate(words)} | model.media
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=model.named or list(model.media),
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE.replace("PICTURE", model.picture),
    ).save_pretrained(folder)
    if model.image_processor is not None:
        model.image_processor.save_pretrained(folder)
    if "<video>" in model.media or model.picture == QWEN_PICTURE:
        tower = config.vision_config
        videos = QWEN_SETTINGS | {"patch_size": tower.patch_size}
        if model.named:
            videos = {"size": {"height": tower.image_size}}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(PUBLISHED))
    parser.add_argument("folder")
    options = parser.parse_args()
    write_folder(options.model, options.folder)


if __name__ == "__main__":
    main()
