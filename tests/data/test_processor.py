"""Processor folders that do not belong to their model, and what the errors name."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.core.errors import DataError
from mmpo_jax.data import pixel_cache
from mmpo_jax.data.pixel_cache import PixelCache, pixel_key
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.processor_files import ProcessorError, plain_encoder
from mmpo_jax.data.records import IMAGE, ImageRef, Turn
from mmpo_jax.picture_world.processor import TOKENS
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def config(folder):
    return load_config(folder)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_tokenizer_larger_than_the_vocabulary(folder, config):
    small = dataclasses.replace(config.decoder, vocab_size=len(TOKENS) - 1)
    message = f"{len(TOKENS)} ids, the model's vocabulary only {len(TOKENS) - 1}"
    with pytest.raises(ProcessorError, match=message) as caught:
        Processor(folder, dataclasses.replace(config, decoder=small))
    assert str(folder) in str(caught.value)
    # The other way round is usual: vocabularies are padded.
    assert config.decoder.vocab_size >= len(TOKENS)
    Processor(folder, config)


def test_no_chat_template(folder, config):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ProcessorError, match="no chat template"):
        Processor(folder, config)


def test_no_eos(folder, config):
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ProcessorError, match="no EOS token"):
        Processor(folder, config)


def test_no_tokenizer(folder, config):
    (folder / "tokenizer.json").unlink()
    for told in (
        r"tokenizer\.json: not found: cannot load the tokenizer; expected tokenizer\.json, or a",
        r"tokenizer\.json: not found, and tokenizer\.model cannot be read as one: .* expected",
    ):
        with pytest.raises(ProcessorError, match=told) as caught:
            Processor(folder, config)
        assert "tiktoken" not in str(caught.value)
        (folder / "tokenizer.model").write_bytes(b"no model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ProcessorError, match="cannot load the tokenizer"):
        Processor(folder, config)


def test_a_template_without_images(folder, config):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(ProcessorError, match=r"writes 0 image tokens \(id 4"):
        Processor(folder, config)


def test_another_image_token(folder, config):
    with pytest.raises(ProcessorError, match=r"0 image tokens \(id 9, from config.json\)"):
        Processor(folder, dataclasses.replace(config, image_token_id=9))


def test_another_image_size(folder, config):
    vision = dataclasses.replace(config.vision, image_size=24)
    with pytest.raises(ProcessorError, match=r"\(3, 16, 16\).*says \(3, 24, 24\)"):
        Processor(folder, dataclasses.replace(config, vision=vision))


def test_image_processor_files(folder, config):
    whole = Processor(folder, config).fingerprints()
    (folder / "preprocessor_config.json").unlink()
    assert Processor(folder, config).fingerprints() == whole  # transformers 5's file has it too
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    edit(path, image_processor={"image_processor_type": "Idefics3ImageProcessorFast"})
    with pytest.raises(ProcessorError, match="'Idefics3ImageProcessor' is not supported"):
        Processor(folder, config)
    path.write_text("{")
    with pytest.raises(ProcessorError, match=r"processor_config\.json"):
        Processor(folder, config)
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "image_processor"}))
    with pytest.raises(ProcessorError, match=r"no preprocessor_config\.json"):
        Processor(folder, config)


def test_fingerprints_change_with_what_they_name(folder, config):
    before = Processor(folder, config).fingerprints()
    assert Processor(folder, config).fingerprints() == before

    def changed():
        after = Processor(folder, config).fingerprints()
        return {name for name in before if after[name] != before[name]}

    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())["image_processor"]
    edit(path, image_processor=settings | {"image_mean": [0.5, 0.5, 0.5]})
    assert changed() == {"image_processor"}
    edit(path, image_processor=None)  # as transformers 4 writes it
    assert changed() == set()
    edit(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    assert changed() == {"image_processor"}
    shutil.copy(folder / "chat_template.jinja", folder / "kept")
    (folder / "chat_template.jinja").write_text((folder / "kept").read_text() + "\n{# new #}")
    assert changed() == {"image_processor", "template"}
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"star"', '"starfish"'))
    assert changed() == {"image_processor", "template", "tokenizer"}


def test_text_there_and_back(tiny_processor):
    text = tiny_processor.render([Turn("user", (IMAGE, IMAGE, "is there a star ?"))], True)
    assert text == "<s> USER: <image> <image> is there a star ? ASSISTANT:"
    ids = tiny_processor.encode(text)
    assert ids.count(tiny.IMAGE_ID) == 2
    image = ImageRef("scene", png_bytes(sample_scene("train", 0, 0)))
    order: list[int] = []
    layouts = tiny_processor.layouts([image, image])
    expanded = tiny_processor.expand_media(ids, layouts, 2, order)
    assert len(expanded) == len(ids) + 2 * 3
    assert order == [0, 1]
    assert tiny_processor.decode([*tiny_processor.encode("a red star"), tiny.EOS_ID, 0, 0]) == (
        "a red star"
    )
    assert (tiny_processor.eos_id, tiny_processor.pad_id) == (tiny.EOS_ID, tiny.PAD_ID)


def test_pad_falls_back_to_eos(folder, config):
    edit(folder / "tokenizer_config.json", pad_token=None)
    assert Processor(folder, config).pad_id == tiny.EOS_ID


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, (tiny.EOS_ID,)),
        ({"eos_token_id": tiny.EOS_ID}, (tiny.EOS_ID,)),
        ({"eos_token_id": 9}, (tiny.EOS_ID, 9)),
        ({"eos_token_id": [9, tiny.EOS_ID, 7]}, (tiny.EOS_ID, 9, 7)),
    ],
)
def test_what_ends_a_generated_response(folder, config, told, expected):
    before = Processor(folder, config)
    (folder / "generation_config.json").write_text(json.dumps(told))
    processor = Processor(folder, config)
    assert processor.eos_ids == expected
    # Samples that were made with other ends are made again.
    changed = processor.fingerprints() != before.fingerprints()
    assert changed == (expected != before.eos_ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "generation_config.json: not a generation config"),
        ('{"eos_token_id": ["a"]}', "generation_config.json: not a generation config"),
        ('{"eos_token_id": 99999}', "has the EOS id 99999, the model's vocabulary only"),
    ],
)
def test_a_broken_generation_config(folder, config, text, message):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ProcessorError, match=message) as caught:
        Processor(folder, config)
    assert str(folder) in str(caught.value)


def test_pixels(tiny_processor):
    image = ImageRef("scene", png_bytes(sample_scene("train", 0, 0)))
    (pixels,) = tiny_processor.pixels([image])
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.dtype == "float32"
    with pytest.raises(DataError, match="broken"):
        tiny_processor.pixels([ImageRef("broken", b"\x89PNG no more")])


def test_pixels_are_counted_once_whoever_made_them_too(monkeypatch):
    """As threads of a server do, that are asked about one image at the same time."""
    pixels = [np.zeros(100, np.uint8)]
    keys = [pixel_key([ImageRef("a", bytes([n] * 50))], []) for n in range(4)]
    monkeypatch.setattr(pixel_cache, "MAX_BYTES", 450)
    kept = PixelCache()
    for _ in range(20):
        kept.put(keys[0], pixels)
    assert kept.get(keys[0]) is pixels
    for key in keys[1:]:
        kept.put(key, pixels)
    assert [kept.get(key) is not None for key in keys] == [False, True, True, True]
    kept.put(pixel_key([ImageRef("a", b"large")], []), [np.zeros(500, np.uint8)])
    assert not any(kept.get(key) for key in keys)


def test_texts_are_encoded_as_the_tokenizer_does(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    for text in ("", " a star", "a <image> b </s>", "é\n  ?"):
        assert tiny_processor.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert plain_encoder(tokenizer) is tokenizer.backend_tokenizer
    for change in ({"__call__": lambda self, text: None}, {"_encode_plus": lambda self: None}):
        other = copy.copy(tokenizer)
        other.__class__ = type("Other", (type(tokenizer),), change)
        assert plain_encoder(other) is None
    cutting = copy.deepcopy(tokenizer)
    cutting.backend_tokenizer.enable_truncation(3)
    assert plain_encoder(cutting) is None
