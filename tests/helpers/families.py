"""One tiny random checkpoint of every family, for what all of them must do alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from helpers import checks, pictures

from mmpo_jax.data.records import Record
from mmpo_jax.models.families import gemma4_unified

TILE = 28
"""Pixels along an edge of a tile."""
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
IMAGE, VIDEO, GEMMA4_VIDEO = "<image>", "<video>", "<|video|>"
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 14,
}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 7,
    "window_size": 28,
    "fullatt_block_indexes": [1],
}
DELTA_NET = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARED_EXPERT = checks.EXPERTS | {"shared_expert_intermediate_size": 40}
QWEN_SETTINGS = {"patch_size": 7, "min_pixels": 4 * 14**2, "max_pixels": 12 * 14**2}
DEEP_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 7,
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [0],
}
DEEP_VIDEOS = {"patch_size": 7, "size": {"shortest_edge": 4 * 14**2, "longest_edge": 48 * 14**2}}
QWEN3_NAMED = {
    "image_token": IMAGE,
    "video_token": VIDEO,
    "vision_start_token": "<vision>",
    "vision_end_token": "</vision>",
}
GEMMA4 = ("gemma4", "gemma4_26b", "gemma4_e2b", "gemma4_unified")
GEMMA4_NAMED = {
    "image_token": IMAGE,
    "video_token": GEMMA4_VIDEO,
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
}
NAMED = {
    "internvl": {
        "context_image_token": IMAGE,
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": VIDEO,
    },
    "qwen2_5_vl": {"image_token": IMAGE, "video_token": VIDEO},
    "qwen3_vl": QWEN3_NAMED,
    "qwen3_vl_moe": QWEN3_NAMED,
    "qwen3_5": QWEN3_NAMED,
    "qwen3_5_moe": QWEN3_NAMED,
    "gemma3": {"image_token": IMAGE, "boi_token": "<boi>", "eoi_token": "<eoi>"},
    **dict.fromkeys(GEMMA4, GEMMA4_NAMED),
}
"""Tokens that tokenizer_config.json names."""


WRITTEN = {"gemma3": "<boi>", "mistral3": "[IMG]"}
"""What templates write for an image, where it is not `IMAGE`."""


def each(processor: Any, images: list[Any]) -> Any:
    return processor(images, return_tensors="pt")


def one_prompt(processor: Any, images: list[Any]) -> Any:
    return processor([images], return_tensors="pt")


def whole_tokens(processor: Any, images: list[Any]) -> Any:
    return processor(images, patch_size=14, return_tensors="pt")


def cropped(processor: Any, images: list[Any]) -> Any:
    return processor(images, crop_to_patches=True, return_tensors="pt")


def squares(processor: Any, images: list[Any]) -> Any:
    """Of Gemma 4's 12B, whose class in transformers needs torchvision."""
    made = gemma4_unified.pixels(None, processor, images)
    places = np.full((len(images), processor.max_soft_tokens, 2), -1)
    for number, image in enumerate(images):
        patches = processor(images=image, return_tensors="np")["image_position_ids"][0]
        columns, rows = (patches.max(axis=0) + 1) // processor.pooling_kernel_size
        row, column = np.divmod(np.arange(columns * rows), columns)
        places[number, : columns * rows] = np.stack([column, row], axis=1)
    return {
        "pixel_values": torch.tensor(np.concatenate(made)),
        "image_position_ids": torch.tensor(places),
    }


@dataclasses.dataclass(frozen=True)
class Tiny:
    """How to make a family's checkpoint, and what transformers' model takes."""

    config: Callable[[bool], Any]
    """Whether the head is tied -> transformers' config."""
    media: tuple[str, ...] = ()
    """Tokens of its vocabulary beside the words."""
    image_processor: Any = None
    prepare: Callable[[Any, list[Any]], Any] = each
    """(image processor, a prompt's images) -> what transformers' model takes."""


def text_sizes(media: tuple[str, ...], tied: bool) -> dict[str, Any]:
    vocabulary = len(checks.token_ids(*media))
    return checks.TEXT | {"vocab_size": vocabulary, "tie_word_embeddings": tied}


def only_text(config: Any, **switches: Any) -> Tiny:
    return Tiny(lambda tied: config(**text_sizes((), tied) | switches))


def llava(tied: bool) -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**text_sizes((IMAGE,), tied)),
        image_token_index=checks.token_ids(IMAGE)[IMAGE],
        tie_word_embeddings=tied,
    )


def llava_next(tied: bool) -> Any:
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.MistralConfig(**text_sizes((IMAGE,), tied), sliding_window=None),
        image_token_index=checks.token_ids(IMAGE)[IMAGE],
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tied,
    )


TILES = (
    IMAGE,
    VIDEO,
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
"""Tokens of families that say where a tile is."""


def idefics3(tied: bool) -> Any:
    return transformers.Idefics3Config(**tiled_sizes(tied))


def smolvlm(tied: bool) -> Any:
    return transformers.SmolVLMConfig(**tiled_sizes(tied))


def tiled_sizes(tied: bool) -> dict[str, Any]:
    return {
        "vision_config": TOWER,
        "text_config": transformers.LlamaConfig(**text_sizes(TILES, tied)),
        "image_token_id": checks.token_ids(*TILES)[IMAGE],
        "scale_factor": 2,
        "tie_word_embeddings": tied,
    }


LINES = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
"""Tokens of a family whose images end their lines."""
GROWING = {
    "head_dim": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.1,
    },
}
"""Queries that grow every eight tokens."""


def mistral3(tied: bool) -> Any:
    return transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**TOWER | {"patch_size": 7}),
        text_config=transformers.Ministral3Config(**text_sizes(LINES, tied), **GROWING),
        image_token_index=checks.token_ids(*LINES)["[IMG]"],
        tie_word_embeddings=tied,
    )


def llava_onevision(tied: bool) -> Any:
    ids = checks.token_ids(IMAGE, VIDEO)
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=transformers.Qwen2Config(**text_sizes((IMAGE, VIDEO), tied)),
        image_token_index=ids[IMAGE],
        video_token_index=ids[VIDEO],
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tied,
    )


def internvl(tied: bool) -> Any:
    media = tuple(NAMED["internvl"].values())
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            **TOWER, attention_bias=True, use_mean_pooling=True
        ),
        text_config=transformers.Qwen2Config(**text_sizes(media, tied)),
        image_token_id=checks.token_ids(*media)[IMAGE],
        tie_word_embeddings=tied,
    )


QWEN_MEDIA = ("<vision>", "</vision>", IMAGE, VIDEO)


QWEN = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
"""Families whose positions are of time, row and column."""


def qwen_sizes(tied: bool, **text: Any) -> dict[str, Any]:
    ids = checks.token_ids(*QWEN_MEDIA)
    return {
        "text_config": text_sizes(QWEN_MEDIA, tied) | text,
        "image_token_id": ids[IMAGE],
        "video_token_id": ids[VIDEO],
        "vision_start_token_id": ids["<vision>"],
        "vision_end_token_id": ids["</vision>"],
        "tie_word_embeddings": tied,
    }


def qwen2_5_vl(tied: bool) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    return transformers.Qwen2_5_VLConfig(
        **qwen_sizes(tied, rope_parameters=rope), vision_config=QWEN_TOWER
    )


def qwen3_vl(tied: bool) -> Any:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    return transformers.Qwen3VLConfig(
        **qwen_sizes(tied, rope_parameters=rope, head_dim=16), vision_config=DEEP_TOWER
    )


def qwen3_vl_moe(tied: bool) -> Any:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    sizes = qwen_sizes(tied, rope_parameters=rope, head_dim=16, **checks.EXPERTS)
    return transformers.Qwen3VLMoeConfig(**sizes, vision_config=DEEP_TOWER)


def qwen3_5(tied: bool, kind: Any = transformers.Qwen3_5Config, **text: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5}
    rope["mrope_section"] = [2, 1, 1]
    tower = {key: x for key, x in DEEP_TOWER.items() if key != "deepstack_visual_indexes"}
    sizes = qwen_sizes(tied, rope_parameters=rope, **DELTA_NET, **text)
    return kind(**sizes, vision_config=tower)


def qwen3_5_moe(tied: bool) -> Any:
    return qwen3_5(tied, transformers.Qwen3_5MoeConfig, **SHARED_EXPERT)


PATTERN = ["sliding_attention", "sliding_attention", "full_attention"] * 2
"""Layers of decoders that are not all alike: two repeats of two and one."""


def gemma3(tied: bool) -> Any:
    media = tuple(NAMED["gemma3"].values())
    ids = checks.token_ids(*media)
    unlike = {"num_hidden_layers": 6, "layer_types": PATTERN, "sliding_window": 12, "head_dim": 8}
    return transformers.Gemma3Config(
        text_config=text_sizes(media, tied) | unlike,
        vision_config=TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=ids[IMAGE],
        boi_token_index=ids["<boi>"],
        eoi_token_index=ids["<eoi>"],
        tie_word_embeddings=tied,
    )


def gemma4(tied: bool, vision: Any = (), **switches: Any) -> Any:
    media = tuple(NAMED["gemma4"].values())
    ids = checks.token_ids(*media)
    unlike = {"num_hidden_layers": 6, "layer_types": PATTERN, "sliding_window": 12, "head_dim": 8}
    unlike |= {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
    tower = {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2}
    tower |= {"position_embedding_size": 160, "standardize": True}
    unlike |= {"use_bidirectional_attention": "vision"}
    return transformers.Gemma4Config(
        text_config=text_sizes(media, tied) | unlike | switches,
        vision_config={**TOWER, **tower, **dict(vision)},
        image_token_id=ids[IMAGE],
        video_token_id=ids[GEMMA4_VIDEO],
        boi_token_id=ids["<boi>"],
        eoi_token_id=ids["<eoi>"],
        tie_word_embeddings=tied,
    )


def gemma4_26b(tied: bool) -> Any:
    experts = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24}
    return gemma4(tied, enable_moe_block=True, **experts)


def gemma4_e2b(tied: bool) -> Any:
    shared = {"num_kv_shared_layers": 3, "use_double_wide_mlp": True, "num_key_value_heads": 1}
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40}
    causal = {"use_bidirectional_attention": None, "attention_k_eq_v": False}
    clipped = {"use_clipped_linears": True, "standardize": False}
    return gemma4(tied, clipped, **shared, **per_layer, **causal)


def gemma4_12b(tied: bool) -> Any:
    media = tuple(NAMED["gemma4"].values())
    ids = checks.token_ids(*media)
    unlike = {"num_hidden_layers": 6, "layer_types": PATTERN, "sliding_window": 72, "head_dim": 8}
    unlike |= {"global_head_dim": 16, "attention_k_eq_v": True}
    squares = {"patch_size": 4, "pooling_kernel_size": 2, "mm_posemb_size": 72}
    return transformers.Gemma4UnifiedConfig(
        text_config=text_sizes(media, tied) | unlike,
        vision_config=squares | {"mm_embed_dim": 16, "output_proj_dims": 16},
        image_token_id=ids[IMAGE],
        video_token_id=ids[GEMMA4_VIDEO],
        boi_token_id=ids["<boi>"],
        eoi_token_id=ids["<eoi>"],
        tie_word_embeddings=tied,
    )


GEMMA4_SETTINGS = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
SQUARE = {"height": TILE, "width": TILE}
SHORTEST = {"size": {"shortest_edge": TILE}, "crop_size": SQUARE}
LONGEST = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}


FAMILIES = {
    "llava": Tiny(llava, (IMAGE,), transformers.CLIPImageProcessorPil(**SHORTEST)),
    "llava_next": Tiny(
        llava_next,
        (IMAGE,),
        transformers.LlavaNextImageProcessorPil(**SHORTEST, image_grid_pinpoints=PINPOINTS),
    ),
    "llava_onevision": Tiny(
        llava_onevision,
        (IMAGE, VIDEO),
        transformers.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        one_prompt,
    ),
    "internvl": Tiny(
        internvl,
        tuple(NAMED["internvl"].values()),
        transformers.GotOcr2ImageProcessorPil(size=SQUARE, min_patches=1, max_patches=4),
        cropped,
    ),
    "idefics3": Tiny(
        idefics3, TILES, transformers.Idefics3ImageProcessorPil(**LONGEST), one_prompt
    ),
    "smolvlm": Tiny(smolvlm, TILES, transformers.SmolVLMImageProcessorPil(**LONGEST), one_prompt),
    "mistral3": Tiny(
        mistral3,
        LINES,
        transformers.PixtralImageProcessorPil(size={"longest_edge": 2 * TILE}, patch_size=7),
        whole_tokens,
    ),
    "qwen2_5_vl": Tiny(
        qwen2_5_vl, QWEN_MEDIA, transformers.Qwen2VLImageProcessorPil(**QWEN_SETTINGS)
    ),
    "qwen3_vl": Tiny(qwen3_vl, QWEN_MEDIA, transformers.Qwen2VLImageProcessorPil(**QWEN_SETTINGS)),
    "qwen3_vl_moe": Tiny(
        qwen3_vl_moe, QWEN_MEDIA, transformers.Qwen2VLImageProcessorPil(**QWEN_SETTINGS)
    ),
    "qwen3_5": Tiny(qwen3_5, QWEN_MEDIA, transformers.Qwen2VLImageProcessorPil(**QWEN_SETTINGS)),
    "qwen3_5_moe": Tiny(
        qwen3_5_moe, QWEN_MEDIA, transformers.Qwen2VLImageProcessorPil(**QWEN_SETTINGS)
    ),
    "gemma3": Tiny(
        gemma3, tuple(NAMED["gemma3"].values()), transformers.Gemma3ImageProcessorPil(size=SQUARE)
    ),
    "gemma4": Tiny(
        gemma4,
        tuple(NAMED["gemma4"].values()),
        transformers.Gemma4ImageProcessorPil(**GEMMA4_SETTINGS),
    ),
    "gemma4_26b": Tiny(
        gemma4_26b,
        tuple(NAMED["gemma4"].values()),
        transformers.Gemma4ImageProcessorPil(**GEMMA4_SETTINGS),
    ),
    "gemma4_e2b": Tiny(
        gemma4_e2b,
        tuple(NAMED["gemma4"].values()),
        transformers.Gemma4ImageProcessorPil(**GEMMA4_SETTINGS),
    ),
    "gemma4_unified": Tiny(
        gemma4_12b,
        tuple(NAMED["gemma4"].values()),
        gemma4_unified.Gemma4UnifiedImageProcessorPil(**GEMMA4_SETTINGS),
        squares,
    ),
    "llama": only_text(transformers.LlamaConfig),
    "mistral": only_text(transformers.MistralConfig, sliding_window=None),
    "ministral3": only_text(transformers.Ministral3Config, **GROWING),
    "qwen2": only_text(transformers.Qwen2Config),
    "qwen3": only_text(transformers.Qwen3Config, head_dim=16),
    "qwen3_moe": only_text(transformers.Qwen3MoeConfig, head_dim=16, **checks.EXPERTS),
    "qwen3_5_text": only_text(transformers.Qwen3_5TextConfig, **DELTA_NET),
    "qwen3_5_moe_text": only_text(transformers.Qwen3_5MoeTextConfig, **DELTA_NET, **SHARED_EXPERT),
    "gemma2": only_text(transformers.Gemma2Config, head_dim=8, sliding_window=12),
    "gemma3_text": only_text(
        transformers.Gemma3TextConfig,
        num_hidden_layers=6,
        layer_types=PATTERN,
        sliding_window=12,
        head_dim=8,
    ),
}
"""By `model_type`; of one with unlike members, those after it by names of their own."""

VIDEO_SETTINGS = {
    "llava_onevision": {"size": SQUARE},
    "internvl": {"size": SQUARE},
    "smolvlm": LONGEST,
    "qwen2_5_vl": QWEN_SETTINGS,
    "qwen3_vl": DEEP_VIDEOS,
    "qwen3_vl_moe": DEEP_VIDEOS,
    "qwen3_5": DEEP_VIDEOS,
    "qwen3_5_moe": DEEP_VIDEOS,
    **dict.fromkeys(GEMMA4, GEMMA4_SETTINGS | {"num_frames": 6}),
}


def make_theirs(name: str, tied: bool = False) -> Any:
    config = FAMILIES[name].config(tied)
    auto = (
        transformers.AutoModelForImageTextToText
        if FAMILIES[name].media
        else transformers.AutoModelForCausalLM
    )
    return auto.from_config(config, attn_implementation="eager")


def make_case(name: str, folder: Path, tied: bool = False) -> checks.Case:
    """The family's checkpoint with large random weights."""
    tiny = FAMILIES[name]
    frame = "<vision> {} </vision>" if name in QWEN else "{}"
    written = {"image": frame.format(IMAGE), "video": frame.format(VIDEO)}
    written["image"] = WRITTEN.get(name, written["image"])
    if name in GEMMA4:
        written["video"] = GEMMA4_VIDEO
    checks.save_tokenizer(folder, *tiny.media, **written)
    if name in NAMED:
        named = {"extra_special_tokens": NAMED[name]}
        transformers.AutoTokenizer.from_pretrained(folder, **named).save_pretrained(folder)
    if name in VIDEO_SETTINGS:
        checks.write_json(folder / "video_preprocessor_config.json", VIDEO_SETTINGS[name])
    return checks.make_case(folder, make_theirs(name, tied), tiny.image_processor)


def records(name: str) -> list[Record]:
    """Two prompts with two responses each, one about an image where the family has them."""
    images = pictures.refs("odd-size") if FAMILIES[name].media else ()
    return [
        checks.record("0", "what is this ?", images, "a red star", "two blue ring and a star"),
        checks.record("1", "red green what is this ?", (), "a ring", "a green ring"),
    ]


def filmed(name: str) -> list[Record]:
    """A prompt about an image and a video, of a family that takes these."""
    record = checks.record("2", "a star ?", pictures.refs("grey"), "a blue star", "two")
    film = (pictures.clip(3),)
    return [dataclasses.replace(record, videos=film)] if name in VIDEO_SETTINGS else []


def inputs(case: checks.Case) -> checks.Inputs:
    """What transformers' model takes beside `input_ids`."""
    tiny = FAMILIES[case.model.config.family]

    def inputs(record: Record, ids: np.ndarray) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if record.images:
            made = dict(tiny.prepare(case.processor.image_processor, checks.load(record.images)))
        for unused in ("num_crops", "num_soft_tokens_per_image"):
            made.pop(unused, None)
        types = dict.fromkeys((*QWEN, *GEMMA4), "mm_token_type_ids")
        types["gemma3"] = "token_type_ids"
        if case.model.config.family in types:
            made[types[case.model.config.family]] = torch.tensor(
                (ids == checks.token_ids(*tiny.media)[IMAGE])[None]
            ).long()
        return made

    return inputs
