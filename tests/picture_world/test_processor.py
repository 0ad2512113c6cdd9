"""The processor folder, loaded the way its users load it."""

import importlib.util

import numpy as np
import pytest
from transformers import AutoTokenizer

from mmpo_jax.picture_world.language import (
    ANSWERS,
    CAPTION_PROMPTS,
    VOCABULARY,
    hallucinated_caption,
    questions,
)
from mmpo_jax.picture_world.processor import TOKENS, save_processor
from mmpo_jax.picture_world.render import render
from mmpo_jax.picture_world.world import sample_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


QUESTION = {
    "role": "user",
    "content": [{"type": "text", "text": "is the star blue ?"}, {"type": "image"}],
}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}


def test_special_tokens(tokenizer):
    assert len(tokenizer) == len(TOKENS) == len(set(TOKENS))
    assert tokenizer.convert_ids_to_tokens(range(len(TOKENS))) == list(TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id == 3
    assert tokenizer.image_token == "<image>" and tokenizer.image_token_id == 4


def test_text_survives_the_tokenizer(tokenizer):
    texts = [*CAPTION_PROMPTS, *ANSWERS.values(), " ".join(VOCABULARY)]
    for i in range(50):
        scene, rng = sample_scene("train", 0, i), np.random.default_rng(i)
        texts += [hallucinated_caption(scene, rng), *(q.text for q in questions(scene, rng, 4))]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        # One token for each word: no <s> or </s> on its own accord, nothing unknown.
        assert len(ids) == len(text.split())
        assert min(ids) > 4
        assert tokenizer.decode(ids) == text


def test_unknown_words_and_adjacent_image_tokens(tokenizer):
    assert tokenizer("a zebra")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer("<image><image> a")["input_ids"][:2] == [4, 4]


def test_chat_template_of_several_turns(tokenizer):
    plain = {"role": "user", "content": "is there a red ring in the picture ?"}
    text = tokenizer.apply_chat_template([QUESTION, ANSWER, plain, ANSWER], tokenize=False)
    assert text == (
        "<s> USER: <image> is the star blue ? ASSISTANT: yes </s>"
        " USER: is there a red ring in the picture ? ASSISTANT: yes </s>"
    )
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.bos_token_id) == 1


def test_generation_prompt_is_a_prefix_of_the_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s> USER: <image> is the star blue ? ASSISTANT:"
    whole = tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)
    assert whole == prompt + " yes </s>"


def test_system_message_comes_first(tokenizer):
    system = {"role": "system", "content": "list the things ."}
    text = tokenizer.apply_chat_template([system, QUESTION], tokenize=False)
    assert text == "<s> list the things . USER: <image> is the star blue ?"


def test_image_processor_without_torch_keeps_the_pixels(folder):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    image = render(sample_scene("train", 0, 0), 48)
    values = processor(image, return_tensors="np")["pixel_values"]
    assert values.shape == (1, 3, 48, 48)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    expected = (np.asarray(image) / 255 - mean) / std
    np.testing.assert_allclose(values[0].transpose(1, 2, 0), expected, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize(("image_size", "patch_size"), [(48, 8), (56, 14)])
def test_llava_processor(tmp_path, image_size, patch_size):
    from transformers import AutoProcessor, LlavaProcessor

    save_processor(tmp_path, image_size, patch_size)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, LlavaProcessor)
    text = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    image = render(sample_scene("train", 0, 0), image_size)
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, image_size, image_size)
    assert (inputs["input_ids"] == 4).sum() == (image_size // patch_size) ** 2
    assert (inputs["input_ids"] == 1).sum() == 1


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="multiple"):
        save_processor(tmp_path, image_size=50, patch_size=8)
