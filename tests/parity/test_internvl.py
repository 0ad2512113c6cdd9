"""InternVL3 against transformers: dynamic tiles, pixel shuffle, InternViT's switches, frames."""

import dataclasses
import itertools
import json
import re
import types

import numpy as np
import pytest
from helpers import pictures

pytest.importorskip("torch")
import torch
import transformers
from helpers import checks
from helpers.word_splits import byte_level, metaspace
from tokenizers import Tokenizer, models, trainers

from mmpo_jax.checkpoints.huggingface import load_model, save_model
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families import internvl
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.model import read_config

pytestmark = pytest.mark.parity

TILE = 28
MEDIA = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
NAMED = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
IDS = checks.token_ids(*MEDIA)
TEXT = checks.TEXT | {"vocab_size": len(IDS)}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 7,
}


def make_config(text, vision, **switches):
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**VISION | vision),
        text_config=text,
        image_token_id=IDS["<IMG_CONTEXT>"],
        pad_token_id=checks.PAD_ID,
        **switches,
    )


CASES = {
    # As InternVL3-8B: biases, no norm behind the last layer.
    "qwen2": make_config(
        # The published ones have this rope.
        transformers.Qwen2Config(
            **TEXT,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
        ),
        {"attention_bias": True},
        tie_word_embeddings=False,
    ),
    # The tower's norms are InternViT-6B's (InternVL3-38B). A layer that is chosen by its number is
    # not normalised, the last one included.
    "llama-6b-last-by-number": make_config(
        transformers.LlamaConfig(**TEXT),
        {
            "use_qk_norm": True,
            "norm_type": "rms_norm",
            "layer_norm_eps": 1e-3,
            "use_mean_pooling": False,
        },
        vision_feature_layer=VISION["num_hidden_layers"],
        tie_word_embeddings=False,
    ),
    "tied-last-norm": make_config(
        transformers.Qwen2Config(**TEXT, tie_word_embeddings=True),
        {"use_mean_pooling": False, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh"},
        projector_hidden_act="relu",
    ),
    "earlier-layer-quarter": make_config(
        transformers.Qwen2Config(**TEXT),
        {"use_mean_pooling": False, "num_attention_heads": 4},
        vision_feature_layer=-2,
        downsample_ratio=0.25,
        tie_word_embeddings=False,
    ),
    # As InternVL3.5-1B and -8B: heads of a size of their own, queries and keys normalised.
    "qwen3-tied": make_config(
        transformers.Qwen3Config(**TEXT, head_dim=16, tie_word_embeddings=True),
        {"attention_bias": True},
        tie_word_embeddings=True,
    ),
    # As InternVL3.5-30B-A3B and -241B-A28B.
    "qwen3-mixture": make_config(
        transformers.Qwen3MoeConfig(**TEXT, **checks.EXPERTS, head_dim=16, norm_topk_prob=True),
        {"attention_bias": True},
        tie_word_embeddings=False,
    ),
}
VIDEO = dataclasses.replace(
    checks.record("v", "what is", (), "two", "a"), videos=(pictures.clip(3),)
)
RECORDS = [*checks.RECORDS, VIDEO, dataclasses.replace(VIDEO, images=pictures.refs("odd-size"))]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl") / request.param
    checks.save_tokenizer(folder, *MEDIA, image="<IMG_CONTEXT>", video="<video>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=NAMED)
    tokenizer.save_pretrained(folder)
    size = {"height": TILE, "width": TILE}
    checks.write_json(folder / "video_preprocessor_config.json", {"size": size})
    theirs = transformers.InternVLForConditionalGeneration(CASES[request.param])
    images = transformers.GotOcr2ImageProcessorPil(size=size, min_patches=1, max_patches=6)
    return checks.make_case(folder, theirs, images)


@pytest.fixture(scope="module")
def their_images(case):
    processor = transformers.GotOcr2ImageProcessorPil.from_pretrained(case.folder)
    return lambda refs: processor(checks.load(refs), crop_to_patches=True, return_tensors="pt")


@pytest.fixture(scope="module")
def inputs(case, their_images):
    def inputs(record, ids):
        made = [their_images(record.images)["pixel_values"]] if record.images else []
        made += [torch.tensor(x) for x in case.processor.pixels((), record.videos)]
        return {"pixel_values": torch.cat(made)} if made else {}

    return inputs


def expanded(config, their_images, record, text):
    """A prompt's text as transformers' processor would expand it.

    It cannot be built without torchvision, hence only its method.
    """
    theirs = object.__new__(transformers.InternVLProcessor)
    theirs.start_image_token, theirs.end_image_token = "<img>", "</img>"
    theirs.image_token = "<IMG_CONTEXT>"
    theirs.image_seq_length = config.num_image_tokens
    made = their_images(record.images) if record.images else {}
    frames = [np.zeros((len(video.frames), 3, TILE, TILE)) for video in record.videos]
    image, video = itertools.count(), itertools.count()

    def expand(match):
        if match.group() == "<IMG_CONTEXT>":
            return theirs.replace_image_token(made, next(image))
        return theirs.replace_video_token({"pixel_values_videos": frames}, next(video))

    return re.sub("<IMG_CONTEXT>|<video>", expand, text)


@pytest.mark.parametrize("name", pictures.IMAGES)
def test_pixels_and_tokens_of_one_image(case, their_images, name):
    record = checks.record("0", "what is this ?", pictures.refs(name))
    theirs, text = their_images(record.images), checks.rendered(case, record)
    checks.check_pixels(case.processor.pixels(record.images), [theirs["pixel_values"]])
    checks.check_tokens(case, record, expanded(case.model.config, their_images, record, text))


def test_tokens_of_several_media(case, their_images):
    videos = pictures.clip(3), pictures.clip(5)
    record = dataclasses.replace(VIDEO, images=pictures.refs("wide", "grey"), videos=videos)
    text = checks.rendered(case, record)
    checks.check_tokens(case, record, expanded(case.model.config, their_images, record, text))


def test_logits(case, inputs):
    checks.check_logits(case, RECORDS, inputs)


def test_greedy_decoding(case, inputs):
    checks.check_greedy(case, RECORDS, inputs)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    checks.check_layout_in_memory(case, tmp_path / "memory")


def test_a_head_that_only_the_outer_switch_ties(case, tmp_path):
    """It is tied where none is stored, as transformers has it, and loaded where one is."""
    save_model(tmp_path / "model", case.model, case.params, case.folder)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = True, False
    checks.write_json(path, config)
    theirs, info = type(case.theirs).from_pretrained(path.parent, output_loading_info=True)
    assert not any(info.values()), info
    model, params = load_model(path.parent)
    tied = model.config.decoder.tie_word_embeddings
    assert tied == case.model.config.decoder.tie_word_embeddings
    head = params["language_model"]["embed_tokens"]["embedding"]
    if not tied:
        head = params["language_model"]["lm_head"]["kernel"].T
    np.testing.assert_array_equal(head, theirs.lm_head.weight.detach().numpy())


LINES = "user\nFrame1: what is this\nFrame2: a star\nsystem two\nFrame3: ring\n" * 3


@pytest.mark.parametrize("split", [byte_level, metaspace])
def test_frame_labels_are_tokenized_as_in_the_whole_text(split):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split()
    specials = [*MEDIA, "<|im_start|>"]
    tokenizer.train_from_iterator([LINES], trainers.BpeTrainer(special_tokens=specials))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=NAMED
    )
    text = "<|im_start|>user\n<video>\n<video>\nwhat is this"
    videos = pictures.clip(3), pictures.clip(2)
    record = dataclasses.replace(VIDEO, videos=videos)
    config = types.SimpleNamespace(num_image_tokens=4)
    expected = tokenizer(expanded(config, None, record, text))["input_ids"]
    ids, token = tokenizer(text)["input_ids"], tokenizer.context_image_token_id
    for video in videos:
        at = ids.index(tokenizer.video_token_id)
        plain = Layout.plain(token, 4 * len(video.frames), len(video.frames))
        ids[at : at + 1] = internvl.frame_video(tokenizer, plain).ids.tolist()
    assert ids == expected


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        ({"downsample_ratio": 0.125}, "divides the tower's 4 patches"),
        ({"vision_feature_layer": [-1]}, r"vision_feature_layer is \[-1\]"),
        ({"vision_feature_layer": 4}, "vision_feature_layer is 4, of 3 layers"),
    ],
)
def test_what_is_not_implemented_is_refused(switches, message):
    config = make_config(transformers.Qwen2Config(**TEXT), {}, **switches)
    with pytest.raises(ModelError, match=message):
        read_config(config)


def test_a_tokenizer_that_names_no_image_tokens_is_refused():
    tokenizer = types.SimpleNamespace(name_or_path="folder")
    with pytest.raises(ModelError, match=r"folder: tokenizer_config\.json names no start_image"):
        internvl.frame_image(tokenizer, Layout.plain(5, 4))


def test_pixel_shuffle():
    """Neighbours from a picture whose only channel counts its places."""
    shuffled = internvl.pixel_shuffle(np.arange(16).reshape(1, 16, 1), 2)
    np.testing.assert_array_equal(
        shuffled[0], [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    )
