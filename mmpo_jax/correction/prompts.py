"""How a language model is asked for the errors of a response, and how its reply is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mmpo_jax.correction.corrections import Error, plain
from mmpo_jax.feedback.split_prompts import is_unicode, read_json
from mmpo_jax.feedback.text_model import UnreadableReply

CORRECT_PROMPT = """\
Two people were asked the same question about an image. The first answer is right in what it says \
about the image, the second one has errors. Find the errors of the second answer, by this codebook:

{codebook}

For every error write two questions that anybody can answer by looking at the image:
- "yes": about what is so, as the first answer says it; the right answer is yes.
- "no": about what the second answer says instead; the right answer is no.
Each question is about one thing and can be understood by itself. Ask of nothing that the first \
answer leaves open, of no opinions and of no wording. Write down at most {max_errors} errors, the \
plainest first, and copy the wrong words of the second answer as they stand there.

Reply with one JSON object and nothing else:
{"errors": [{"kind": "a word of the codebook", "wrong": "...", "yes": "...?", "no": "...?"}]}
If the second answer has no such error, the list is empty.

Question: {question}
First answer: {chosen}
Second answer: {rejected}"""

_TEXT = {"type": "string"}


def errors_schema(kinds: Collection[str]) -> Mapping[str, Any]:
    """JSON schema of a reply, for servers that hold a model to one."""
    error = {
        "type": "object",
        "properties": {
            "kind": {"type": "string", "enum": list(kinds)},
            "wrong": _TEXT,
            "yes": _TEXT,
            "no": _TEXT,
        },
        "required": ["kind", "wrong", "yes", "no"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"errors": {"type": "array", "items": error}},
        "required": ["errors"],
        "additionalProperties": False,
    }


def read_errors(reply: str, rejected: str, kinds: Collection[str]) -> tuple[Error, ...]:
    """The errors of a reply, which may stand in the one code fence there is.

    Args:
      reply: of the model.
      rejected: the response that the errors are of.
      kinds: names in the codebook.

    Raises:
      UnreadableReply: it is anything else than one object of `errors_schema`, an error quotes what
        the response does not say, or a question is none, or is answered with yes and with no.
    """
    given = read_json(reply)
    if not isinstance(given, dict) or set(given) != {"errors"}:
        raise UnreadableReply("no_errors_key", "not an object with the one key `errors`")
    if not isinstance(given["errors"], list):
        raise UnreadableReply("no_errors_key", "`errors` is no list")
    found = tuple(
        _read_error(item, f"error {number}", rejected, kinds)
        for number, item in enumerate(given["errors"], start=1)
    )
    answered_yes = {plain(error.yes) for error in found}
    both = next((error.no for error in found if plain(error.no) in answered_yes), None)
    if both is not None:
        raise UnreadableReply("contradiction", f"{both!r} is answered with yes and with no")
    return found


def _read_error(item: Any, name: str, rejected: str, kinds: Collection[str]) -> Error:
    keys = ("kind", "wrong", "yes", "no")
    if not isinstance(item, dict) or set(item) != set(keys):
        raise UnreadableReply("bad_error", f"{name} is no {{{', '.join(keys)}}}")
    texts = [item[key] for key in keys]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UnreadableReply("bad_error", f"{name} has an empty entry")
    if not all(map(is_unicode, texts)):
        raise UnreadableReply("bad_error", f"{name} has half a character")
    error = Error(*(text.strip() for text in texts))
    if error.kind not in kinds:
        raise UnreadableReply("unknown_kind", f"{name}: {error.kind!r} is not in the codebook")
    if plain(error.wrong) not in plain(rejected):
        raise UnreadableReply("not_quoted", f"{name}: the response does not say {error.wrong!r}")
    for asked in (error.yes, error.no):
        if not asked.endswith(("?", "\uff1f", "\u061f")):
            raise UnreadableReply("no_question", f"{name}: {asked!r} is no question")
    return error
