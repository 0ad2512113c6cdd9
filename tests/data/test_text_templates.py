"""Chat templates of checkpoints: plain text or parts, whichever file they are in."""

import dataclasses
import json
import shutil

import pytest
import transformers
from helpers import tiny

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.data.chat_template import TemplateRefusal
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.processor_files import ProcessorError
from mmpo_jax.data.records import Record, Response, Turn, placed
from mmpo_jax.data.tokenization import tokenize_records

# In the manner of the published ones, which read `message['content']` as text.
QWEN = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '<|im_start|>assistant\\n' -}} {%- endif -%}
"""
LLAMA_2 = """\
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%} {{- '[INST] ' + message['content'].strip() + ' [/INST]' -}}
  {%- else -%} {{- ' ' + message['content'].strip() + ' ' -}} {%- endif -%}
{%- endfor -%}
"""
LLAMA_3 = """\
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
  {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
PARTS = """\
{%- for message in messages -%}
  {{- message['role'] + ': ' -}}
  {%- for part in message['content'] -%}
    {{- '<image> ' if part['type'] == 'image' else part['text'] + ' ' -}}
  {%- endfor -%}
{%- endfor -%}
"""
DIALOGUE = (Turn("user", "is this a star ?"), Turn("assistant", "a star"), Turn("user", "what ?"))


@pytest.fixture
def text_folder(family_case, tmp_path):
    return shutil.copytree(family_case("qwen2").folder, tmp_path / "text")


@pytest.fixture
def image_folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "image")


def with_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    return Processor(folder, load_config(folder))


@pytest.mark.parametrize("template", [QWEN, LLAMA_2, LLAMA_3])
def test_text_models_write_what_transformers_writes(text_folder, template):
    processor = with_template(text_folder, template)
    theirs = transformers.AutoTokenizer.from_pretrained(text_folder).apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in DIALOGUE],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert processor.render(DIALOGUE, True) == theirs
    assert all(turn.text in theirs for turn in DIALOGUE)


def test_a_text_model_whose_template_reads_parts(text_folder):
    written = with_template(text_folder, PARTS).render(DIALOGUE, True)
    assert written == "user: is this a star ? assistant: a star user: what ? "


def test_templates_that_write_no_text(text_folder):
    for template, told in (("nothing", "does not write"), ("{{ raise_exception('no') }}", "no")):
        with pytest.raises(ProcessorError, match=told) as caught:
            with_template(text_folder, template)
        assert str(text_folder) in str(caught.value)


def test_a_dialogue_that_the_template_refuses_is_left_out(text_folder):
    processor = with_template(text_folder, LLAMA_2)
    system = Turn("system", "be brief")
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        processor.render((system, DIALOGUE[0]), True)
    answer = (Response((Turn("assistant", "a star"),)),)
    prompts = {"good": DIALOGUE[:1], "bad": (system, DIALOGUE[0])}
    rows = [Record(name, (), prompt, answer) for name, prompt in prompts.items()]
    kept, skipped = tokenize_records(rows, processor, Lengths(prompt=(64,), response=(16,)))
    assert [row.id for row in kept] == ["good"]
    assert [(row.id, row.reason) for row in skipped] == [("bad", "template_refuses")]


def test_the_template_of_older_processors(image_folder):
    """It comes before the tokenizer's, which may be that of the text model, not before .jinja."""
    (image_folder / "chat_template.jinja").unlink()
    settings = image_folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": QWEN}))
    older = image_folder / "chat_template.json"
    older.write_text(json.dumps({"chat_template": PARTS}))
    processor = Processor(image_folder, load_config(image_folder))
    assert processor.render(placed(DIALOGUE[:1], 1, 0), True) == "user: <image> is this a star ? "
    jinja = PARTS.replace("': '", "'; '")
    assert (
        with_template(image_folder, jinja).render(placed(DIALOGUE[:1], 1, 0), True)[:5] == "user;"
    )
    (image_folder / "chat_template.jinja").unlink()
    older.write_text("{}")
    with pytest.raises(ProcessorError, match=r"chat_template\.json: not a chat template"):
        Processor(image_folder, load_config(image_folder))


def test_placeholders_need_no_place_in_the_vocabulary(image_folder):
    """As in InternVL3, whose video token comes after the last embedding."""
    config = load_config(image_folder)
    last = len(transformers.AutoTokenizer.from_pretrained(image_folder)) - 1
    assert last != config.image_token_id

    def shrunk(image_token_id):
        decoder = dataclasses.replace(config.decoder, vocab_size=last)
        return dataclasses.replace(config, decoder=decoder, image_token_id=image_token_id)

    with pytest.raises(ProcessorError, match="do not belong together"):
        Processor(image_folder, shrunk(config.image_token_id))
    word = transformers.AutoTokenizer.from_pretrained(image_folder).convert_ids_to_tokens(last)
    (image_folder / "chat_template.jinja").write_text(PARTS.replace("<image>", word))
    assert Processor(image_folder, shrunk(last)).placeholders == (last,)


def test_no_space_is_left_before_eos(tmp_path):
    """LLaVA-1.5's template of the hub writes one behind every answer."""
    folder = tiny.make_sentencepiece_folder(tmp_path / "model")
    processor = Processor(folder, load_config(folder))
    record = Record("0", (), DIALOGUE[:1], (Response(DIALOGUE[1:2]),))
    kept, _ = tokenize_records([record], processor, None)
    ids = kept[0].responses[0].ids.tolist()
    assert "".join(processor.tokenizer.convert_ids_to_tokens(ids)) == "▁a▁star</s>"
