"""Chat templates that a recipe may name in place of the checkpoint's own."""

from __future__ import annotations

VICUNA_V1 = """\
{%- set default = "A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- macro text(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content if part['type'] == 'text' -%} {{- part['text'] -}} {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
  {{- text(messages[0]['content']) + ' ' -}}
{%- else -%}
  {{- default + ' ' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' -}}
    {%- if message['content'] is not string -%}
      {%- for part in message['content'] if part['type'] == 'image' -%}
        {{- '<image>\\n' -}}
      {%- endfor -%}
    {%- endif -%}
    {{- text(message['content']) + ' ' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- 'ASSISTANT: ' + text(message['content']) + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- 'ASSISTANT:' -}} {%- endif -%}
"""
"""What LLaVA-1.5 was trained with, and RLAIF-V trains it with (`vicuna_v1` in LLaVA's
conversation.py): BOS, a system prompt, `USER: <image>\\n...`, ` ASSISTANT: ...</s>`. The template
that its hub repositories have says only `USER: ... ASSISTANT: ...`."""

TEMPLATES = {"vicuna_v1": VICUNA_V1}
