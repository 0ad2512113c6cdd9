"""SmolLM2 as the decoder of a LLaVA whose tower and projector are random, against transformers."""

import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from helpers import pictures, smollm2  # noqa: E402
from PIL import Image  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

IMAGE = "<image>"
SIZE, PATCH = 56, 14
TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- for part in message['content'] -%}
    {{- '<image>\\n' if part['type'] == 'image' else part['text'] -}}
  {%- endfor -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '<|im_start|>assistant\\n' -}} {%- endif -%}
"""
ROWS = {  # pictures, prompt, responses
    "one": (["photograph"], "Who is in the picture?", ["Grace Hopper, in uniform.", "Nobody"]),
    "two": (["wide", "odd-size"], "Which of them is wider?", ["The first.", "Both are equal ≠"]),
    "none": ([], "What is a picture?", ["Colours on a plane\n\n(or numbers)", "A word."]),
}


@pytest.fixture(scope="module")
def folder(short_folder, tmp_path_factory):
    """The real tokenizer with one token more, for which the vocabulary is resized."""
    from helpers import checks

    folder = tmp_path_factory.mktemp("llava") / "smollm2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(short_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    decoder = smollm2.load_theirs(short_folder)
    torch.manual_seed(0)
    decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
    tower = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=decoder.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        checks.randomise(part, seed=0)
    model.save_pretrained(folder)
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def test_ids_and_log_probs(mmpo, folder, tmp_path):
    processor = transformers.AutoProcessor.from_pretrained(folder)
    theirs = smollm2.load_theirs(folder, "LlavaForConditionalGeneration")
    used = {name for images, *_ in ROWS.values() for name in images}
    for name in used:
        (tmp_path / name).write_bytes(pictures.IMAGES[name])
    rows = [
        {"id": name, "images": images, "prompt": prompt, "responses": responses}
        for name, (images, prompt, responses) in ROWS.items()
    ]
    scores = mmpo("score", folder, rows, "--tokens", "lengths={prompt: [64], response: [32]}")
    assert [row["id"] for row in scores] == list(ROWS)
    for row, (images, prompt, responses) in zip(scores, ROWS.values(), strict=True):
        opened = [Image.open(tmp_path / name).convert("RGB") for name in images]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
        inputs = [
            processor(
                text=processor.apply_chat_template(
                    [
                        {"role": "user", "content": content},
                        {"role": "assistant", "content": [{"type": "text", "text": text}]},
                    ]
                ),
                images=opened or None,
                return_tensors="pt",
                add_special_tokens=False,
            )
            for text in responses
        ]
        for made, ids, found in zip(inputs, row["response_ids"], row["logps"], strict=True):
            ours = [*row["prompt_ids"], *ids]
            whole = made["input_ids"][0].tolist()
            assert ours == whole[: len(ours)] and ids[-1] == processor.tokenizer.eos_token_id
            assert processor.tokenizer.decode(whole[len(ours) :]) == "\n"
            pixels = {"pixel_values": made["pixel_values"]} if images else {}
            expected = smollm2.log_prob(theirs, row["prompt_ids"], ids, **pixels)
            assert found == pytest.approx(expected, rel=0, abs=1e-3)
            if images:  # the picture matters
                blank = {"pixel_values": torch.zeros_like(made["pixel_values"])}
                other = smollm2.log_prob(theirs, row["prompt_ids"], ids, **blank)
                assert abs(other - expected) > 0.1
