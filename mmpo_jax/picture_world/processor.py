"""Writes the processor folder of the picture world: an ordinary Hugging Face LLaVA processor.

`transformers.AutoProcessor` loads the folder where torch is installed; where it is not,
`AutoTokenizer` and `CLIPImageProcessorPil` do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmpo_jax.picture_world.language import VOCABULARY

IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN)
ROLES = ("USER:", "ASSISTANT:")
TOKENS = (*SPECIAL_TOKENS, *ROLES, *VOCABULARY)  # a token's id is its place here
MODEL_MAX_LENGTH = 1024

_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3

# LLaVA-1.5's conversation, with spaces for its newlines. Images come before the text of their
# message, whatever the order of the parts. Rendering with `add_generation_prompt` gives a prefix
# of rendering with the answer.
CHAT_TEMPLATE = """\
{{- '<s>' -}}
{%- for message in messages -%}
  {%- if message['role'] != 'system' -%}
    {{- ' ' + message['role'] | upper + ':' -}}
  {%- endif -%}
  {%- if message['content'] is string -%}
    {{- ' ' + message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}
      {{- ' <image>' -}}
    {%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {{- ' ' + part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{- ' </s>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ' ASSISTANT:' -}}
{%- endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: one token for each word between spaces.

    It adds no <s> and no </s> by itself; the chat template writes them. Decoding joins the words
    with single spaces.
    """
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=MODEL_MAX_LENGTH,
        # Else decoding would pull punctuation to the word before it.
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(folder: str | Path, image_size: int = 48, patch_size: int = 8) -> None:
    """Writes tokenizer, image processor, processor and chat template to a folder.

    Args:
      folder: made if missing; files of the same names are overwritten.
      image_size: height and width of the model's input, in pixels.
      patch_size: of the vision tower, in pixels. An image stands for
        `(image_size // patch_size) ** 2` image tokens.

    Raises:
      ValueError: `image_size` is not a positive multiple of `patch_size`.
    """
    if patch_size <= 0 or image_size <= 0 or image_size % patch_size:
        raise ValueError(
            f"image_size must be a positive multiple of patch_size: {image_size}, {patch_size}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    # transformers 5.x writes a class name and a list that 4.x cannot read; both read these.
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config["extra_special_tokens"] = {"image_token": IMAGE_TOKEN}
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)

    image_processor = _image_processor_config(image_size)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": patch_size,
        "vision_feature_select_strategy": "default",
        # CLIP's class token, which the "default" strategy drops again.
        "num_additional_image_tokens": 1,
        "image_token": IMAGE_TOKEN,
    }
    # transformers 4.x reads the image processor from its own file, 5.x from inside the processor's.
    _write_json(folder / "preprocessor_config.json", image_processor)
    _write_json(folder / "processor_config.json", processor | {"image_processor": image_processor})


def _image_processor_config(image_size: int) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(_IMAGE_MEAN),
        "image_std": list(_IMAGE_STD),
    }


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
