"""Control tokens that are typed in keys of messages and arguments, and tokens of media in
answers."""

import dataclasses
import json
import shutil

import pytest
import tokenizers
import transformers
from helpers.format_rows import write_jsonl

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.cli import main
from mmpo_jax.data.control_tokens import ControlTokens
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record, Response, Turn
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.sources import FileData
from mmpo_jax.data.tally import TextNotes
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.data.usable import usable_records, without_shown_media

LIMITS = {"max_prompt": 256, "max_response": 64}
TEMPLATE = """\
{%- if tools -%} {{- tools | tojson + ' ' -}} {%- endif -%}
{%- for message in messages -%}
  {{- message['role'] + ' ' -}}
  {%- if message.reasoning_content -%} {{- message.reasoning_content + ' ' -}} {%- endif -%}
  {%- if message.tool_calls -%} {{- message.tool_calls | tojson + ' ' -}} {%- endif -%}
  {%- for part in message['content'] -%}
    {{- '<image> ' if part['type'] == 'image' else part['text'] + ' ' -}}
  {%- endfor -%}
  {%- if message['role'] == 'assistant' -%} {{- '</s>' -}} {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- 'assistant ' -}} {%- endif -%}
"""


def with_template(tiny_folder, parent, template):
    folder = shutil.copytree(tiny_folder, parent / "llava")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Processor(folder, load_config(folder))


@pytest.fixture(scope="module")
def processor(tiny_folder, tmp_path_factory):
    return with_template(tiny_folder, tmp_path_factory.mktemp("keys"), TEMPLATE)


def rows(token):
    """The token typed in each place that is no content."""
    question, answer = Turn("user", "a star ?"), Turn("assistant", "yes")
    thought = dataclasses.replace(answer, keys={"reasoning_content": f"a {token} ring"})
    call = {"function": {"name": "f", "arguments": {"x": [f"{token} star"]}}}
    called = dataclasses.replace(answer, keys={"tool_calls": [call]})
    yield Record("thought", (), (question,), (Response((thought,)),))
    yield Record("earlier", (), (question, thought, question), (Response((answer,)),))
    yield Record("called", (), (question,), (Response((called,)),))
    tools = {"tools": [{"name": "f", "description": f"{token} red"}]}
    yield Record("tools", (), (question,), (Response((answer,)),), template=tools)


def count(processor, record, token):
    row = tokenize(record, processor, **LIMITS)
    (response,) = row.responses
    return [*row.prompt_ids, *response.ids].count(processor.tokenizer.convert_tokens_to_ids(token))


@pytest.mark.parametrize("place", range(4))
def test_keys_and_arguments(processor, place):
    record = list(rows("</s>"))[place]
    plain = dataclasses.replace(record, plain_text=True)
    ends = count(processor, plain, "</s>")
    assert count(processor, record, "</s>") == ends + 1
    assert ends == sum(turn.role == "assistant" for turn in record.prompt) + 1
    notes = TextNotes()
    notes.add(record, processor)
    assert notes.typed == {"</s>": 1}


@pytest.mark.parametrize("place", range(4))
def test_placeholders_are_text_there(processor, place):
    assert count(processor, list(rows("<image>"))[place], "<image>") == 0


@pytest.mark.parametrize(
    "written", ["{{- tools[0] -}}", "{{- tools | string -}}", "{{- tools | tojson(true) -}}"]
)
def test_templates_that_write_objects_as_python_does(tiny_folder, tmp_path, written):
    """No character that stands for a control token comes through."""
    template = TEMPLATE.replace("{{- tools | tojson + ' ' -}}", written)
    processor = with_template(tiny_folder, tmp_path, template)
    *_, typed = rows("</s>")
    assert count(processor, typed, "</s>") == 2
    for record in (dataclasses.replace(typed, plain_text=True), list(rows("<image>"))[-1]):
        with pytest.raises(UnusableRow) as refused:
            tokenize(record, processor, **LIMITS)
        assert refused.value.reason == "template_refuses"
    *_, other = rows(r"\U0010f000")
    assert count(processor, dataclasses.replace(other, plain_text=True), "</s>") == 1


@pytest.fixture
def sampled(tiny_processor, tmp_path):
    """A file of three samples, the second of which has an image token among its ids."""
    star, image = tiny_processor.encode("star")[0], tiny_processor.placeholders[0]
    eos = tiny_processor.eos_id
    ids = [[star, eos], [image, star, eos], [star, star, eos]]
    texts = [tiny_processor.decode(one) for one in ids]
    row = {"id": "r", "prompt": "what ?", "responses": texts, "response_ids": ids}
    return write_jsonl(tmp_path / "rows.jsonl", [row])


def test_a_sample_with_an_image_token_is_left_out_alone(sampled, tiny_processor, tmp_path, caplog):
    source = FileData(source="file", path=str(sampled)).load(supervised=True)
    skipped = tmp_path / "skipped.jsonl"
    source, (row,) = usable_records(source, tiny_processor, None, str(skipped))
    assert (len(row.responses), row.left_out, source.skipped) == (2, (1,), [])
    assert "responses left out of rows: image_position 1" in caplog.text
    (told,) = map(json.loads, skipped.read_text().splitlines())
    assert (told["reason"], told["detail"].partition(":")[0]) == ("image_position", "response 2")


def test_check_tells_of_it(sampled, tiny_folder, capsys):
    assert main(["data", "check", str(sampled), "--model", str(tiny_folder)]) == 0
    report = capsys.readouterr().out
    assert "1 rows, 1 can be used" in report
    assert "responses left out of rows that are used: image_position 1" in report


def test_a_pair_that_loses_one_is_left_to_be_refused(tiny_processor):
    image = tiny_processor.placeholders[0]
    samples = [Response.of("star", rank=1), Response.of("ring", rank=2, token_ids=(image,))]
    record = Record("r", (), (Turn("user", "what ?"),), tuple(samples))
    assert without_shown_media(record, tiny_processor) == record


def test_words_of_the_vocabulary_are_text_too(tiny_processor):
    """A model of words has its control tokens among the words."""
    image = tiny_processor.placeholders[0]
    asked = (Turn("user", "what ?"),)
    answers = Response.of("a <image> star", rank=1), Response.of("a ring", rank=2)
    row = tokenize(Record("r", (), asked, answers), tiny_processor, **LIMITS)
    assert image not in row.responses[0].ids
    assert len(row.responses[0].ids) == 4


def test_pieces_of_a_unigram_vocabulary_are_text_too():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "</s>ab ")]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0)),
        eos_token="</s>",
        unk_token="<unk>",
    )
    control = ControlTokens(tokenizer, ())
    ids, offsets = control.encode(control.stand_in("a</s>b"))
    assert 1 not in ids and 0 not in ids
    assert offsets[-1] == (5, 6)
    assert control.encode("a</s>")[0][-1] == 1


def test_check_takes_the_option_of_recipes(tiny_folder, tmp_path, capsys):
    row = {"prompt": "a </s> ?", "chosen": "a", "rejected": "b"}
    file = write_jsonl(tmp_path / "rows.jsonl", [row])
    flags = ["data", "check", str(file), "--model", str(tiny_folder)]
    typed = "rows whose texts type control tokens: </s> 1"
    assert main(flags) == 0
    assert typed in capsys.readouterr().out
    assert main([*flags, "--control-tokens", "text"]) == 0
    assert typed not in capsys.readouterr().out
