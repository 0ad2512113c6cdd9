"""How a language model is asked for the claims of a response, and how its reply is read.

Two styles. `json`: one reply holds claims and questions as an object. `rlaif_v`: a first reply
lists facts under a heading, a second one the questions for them, in the form that RLAIF-V's two
published models were tuned on (its `utils/llama3_8b_inference.py`; the wordings here are our own).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmpo_jax.feedback.text_model import UnreadableReply

CLAIMS_PROMPT = """\
Someone was asked about an image and answered. You do not see the image. Take the answer apart into
claims that can be checked by looking at the image.

- A claim is one full sentence that says one thing and can be understood without the others: names
  in place of "it" or "they".
- Together the claims say everything that the answer says about what is in the image. Add nothing,
  correct nothing, and leave out opinions, feelings, guesses and advice.
- Write a question for every claim that is answered with yes if the claim is true and with no if it
  is not. Keep its tense, and "not" where the claim has it.

Reply with one JSON object and nothing else:
{"claims": [{"claim": "...", "question": "..."}]}
If the answer says nothing that could be checked, the list is empty.

Question: {question}
Answer: {answer}"""

FACTS_PROMPT = """\
You are an expert in taking facts out of a question and its answer about an image. Write each fact \
of the answer as a sentence that can be understood by itself. Leave out opinions and whatever is \
subjective.
Write in this form:
### Facts:
- fact
- fact

### Question-answer pair:
Question: {question}
Answer: {answer}"""

QUESTIONS_PROMPT = """\
You are an expert in turning statements into questions that are answered with yes or no. Turn each \
sentence into one question, in their order. Keep the tense and any negation, and add nothing.
Write in this form:
### Modified sentences:
- question
- question

### Sentences:
{facts}"""

WHOLE_PROMPT = """\
Someone was asked about this image and answered. Compare every statement of the answer with the \
image: objects, their attributes and numbers, places and actions.

Question: {question}
Answer: {answer}

Is the answer right in all that it says?"""
"""What a labeler is asked about a response that is not divided; a recipe's `suffix` follows."""

CLAIMS_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "claims": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"claim": {"type": "string"}, "question": {"type": "string"}},
                "required": ["claim", "question"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["claims"],
    "additionalProperties": False,
}
"""What a reply of style `json` is."""

FENCE = "```"
_BULLET = re.compile(r"\s*(?:[-*\u2022\u2013]|\d+[.)])\s+")


def read_claims(reply: str) -> list[tuple[str, str]]:
    """(claim, question) of a reply in style `json`, which may stand in the one code fence there is.

    Raises:
      UnreadableReply: it is anything else than one object of `CLAIMS_SCHEMA`.
    """
    given = read_json(reply)
    if not isinstance(given, dict) or set(given) != {"claims"}:
        raise UnreadableReply("no_claims_key", "not an object with the one key `claims`")
    if not isinstance(given["claims"], list):
        raise UnreadableReply("no_claims_key", "`claims` is no list")
    found = []
    for number, item in enumerate(given["claims"], start=1):
        if not isinstance(item, dict) or set(item) != {"claim", "question"}:
            raise UnreadableReply("bad_claim", f"claim {number} is no {{claim, question}}")
        pair = [item["claim"], item["question"]]
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise UnreadableReply("bad_claim", f"claim {number} has an empty claim or question")
        if not all(map(is_unicode, pair)):
            raise UnreadableReply("bad_claim", f"claim {number} has half a character")
        found.append((pair[0].strip(), pair[1].strip()))
    return found


def read_json(reply: str) -> Any:
    """What a reply says as JSON, which may stand in the one code fence there is.

    Raises:
      UnreadableReply: it is no JSON.
    """
    try:
        return json.loads(_unfenced(reply))
    except (ValueError, RecursionError) as error:
        raise UnreadableReply("no_json", f"no JSON object: {error}") from error


def _unfenced(reply: str) -> str:
    """What stands in the one code fence of a reply; the whole reply where there is another number
    of them."""
    parts = reply.split(FENCE)
    if len(parts) != 3 or reply.lstrip().startswith("{"):
        return reply
    inside = parts[1].lstrip()
    return inside[4:] if inside[:4].lower() == "json" else inside


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON may hold one half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_list(reply: str) -> list[str]:
    """The items of a list under a heading, in style `rlaif_v`.

    Items begin with a dash, a star or a number. What stands before the first heading is talk; a
    line without a mark goes on with the item in the line before it.

    Raises:
      UnreadableReply: there is no item, or something else stands before the first one or, apart,
        behind one.
    """
    lines = reply.splitlines()
    headings = [place for place, line in enumerate(lines) if line.lstrip().startswith("###")]
    if headings:
        end = headings[1] if len(headings) > 1 else len(lines)
        lines = lines[headings[0] + 1 : end]
    items: list[str] = []
    in_item = False
    for line in lines:
        mark = _BULLET.match(line)
        if mark:
            items.append(line[mark.end() :].strip())
        elif in_item and line.strip():
            items[-1] += " " + line.strip()
        elif line.strip():
            raise UnreadableReply("no_list", f"{line.strip()[:80]!r} is no item of a list")
        in_item = bool(line.strip())
    if not items or not all(items):
        raise UnreadableReply("no_list", "there is no list, or it has an empty item")
    return items


def as_list(items: Sequence[str]) -> str:
    """Sentences as a list with dashes; one that has several lines becomes one."""
    return "\n".join("- " + " ".join(item.split()) for item in items)
