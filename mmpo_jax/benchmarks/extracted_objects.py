"""The objects that a judge finds in descriptions, for Object HalBench: asked, or from files."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from mmpo_jax.benchmarks.benchmark import Files
from mmpo_jax.benchmarks.coco import image_number
from mmpo_jax.benchmarks.judging import REVIEWS, Judge, JudgePrompt, Question
from mmpo_jax.benchmarks.scripts import official_name, script_of
from mmpo_jax.benchmarks.tables import Row
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.prompts import fill

Reading = Literal["official", "any_list"]

SHORT = 3
"""Words up to which a description names nothing, and no judge is asked."""

SCRIPTS = ("eval_gpt_obj_halbench.py", "eval/eval_gpt_obj_halbench.py")
"""The file of RLAIF-V's and RLHF-V's repositories that has the judge's prompt."""

PROMPT = """\
You read a question about a picture and somebody's answer, and list the things that the answer \
says are in the picture. Take the answer to be right; you do not see the picture.

- List a thing only if the answer names it, and if it can be seen.
- A thing is its bare name: no colour, size, material, number or other property of it.
- Reply with a JSON list of texts on one line, such as ["dog", "dining table"], and nothing else.
- Where the answer names no such thing, the list is empty: [].

Question: {question}

Answer: {answer}
"""

JUDGE = JudgePrompt(
    "object_halbench-1",
    official="gpt-3.5-turbo-0613",
    max_new_tokens=512,
    temperature=0.2,
    attempts=5,
)
"""As the script asks, but for the attempts, of which it makes 100."""


@dataclasses.dataclass(frozen=True)
class Caption:
    """A description of an image."""

    image: int
    question: str | None
    """What was asked; None where nobody says."""
    text: str


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What is known of the objects in a description."""

    names: Sequence[str] | None = None
    """As the judge calls them; None where it gave no list."""
    nouns: Sequence[str] | None = None
    """The nouns of them, where a file has these."""
    reply: str | None = None
    """Of the judge; None where there is none."""


def asked_objects(
    files: Files, judge: Judge, captions: Sequence[Caption], reading: Reading
) -> list[Extracted]:
    """Objects that a judge lists, asked in the words of the script where it lies there.

    Raises:
      MmpoError: there is no judge, or a description has no question.
    """
    judge.check()
    script = script_of(files, *SCRIPTS)
    template = None if script is None else script.constant("prompt_template")
    prompt = JUDGE
    if template is not None:
        prompt = dataclasses.replace(JUDGE, name=official_name("object_halbench", template))
    long = {n: one for n, one in enumerate(captions) if len(one.text.split()) > SHORT}
    to_ask = [Question(str(one.image), _asked(one, template)) for one in long.values()]
    replies = judge.ask(prompt, to_ask, lambda reply: read_objects(reply, reading) is not None)
    found = [Extracted(names=[])] * len(captions)
    for n, reply in zip(long, replies, strict=True):
        names = None if reply.text is None else read_objects(reply.text, reading)
        found[n] = Extracted(names, reply=reply.text)
    return found


def published_objects(
    judge: Judge, captions: Sequence[Caption], reading: Reading
) -> list[Extracted] | None:
    """Those of a file in a layout of the official script, or of replies; None without a file.

    Raises:
      MmpoError: it has none of a description, or those of another text.
    """
    if judge.published is None:
        return None
    rows: dict[int, list[Row]] = collections.defaultdict(list)
    for row in _sentences(judge.published):
        rows[image_number(row.need("image_id", "id"), row.name)].append(row)
    judge.tell(JUDGE, [])
    return [_published(one, rows[one.image], judge.published[0].file, reading) for one in captions]


def read_objects(reply: str, reading: Reading = "official") -> list[str] | None:
    """The names in a judge's reply; None where it cannot be read.

    The official script takes whatever is JSON: of a text its letters, of an object its keys.
    """
    if reading == "any_list":
        return _first_list(reply)
    try:
        content = json.loads(reply)
    except ValueError:
        try:
            content = json.loads(reply.strip().split("\n")[-1]) if '["' in reply else None
        except ValueError:
            return None
    return [str(name) for name in content] if isinstance(content, list | str | dict) else None


def _first_list(reply: str) -> list[str] | None:
    """The first list of texts that stands in a reply; of `()` an empty one."""
    for place, sign in enumerate(reply):
        if sign != "[":
            continue
        try:
            found, _ = json.JSONDecoder().raw_decode(reply, place)
        except ValueError:
            continue
        if all(isinstance(name, str) for name in found):
            return found
    return [] if reply.strip() == "()" else None


def _asked(caption: Caption, template: str | None) -> str:
    if caption.question is None:
        raise MmpoError(
            f"the description of image {caption.image} has no `question` or `prompt`, which the "
            "judge is told; add it, or put the file of questions into the folder of --data"
        )
    return fill(template or PROMPT, question=caption.question, answer=caption.text)


def _sentences(published: Sequence[Row]) -> list[Row]:
    """The rows of a file, or the sentences of hall_*.json, which is one object."""
    found = []
    for row in published:
        sentences = row.get("sentences")
        if sentences is None:
            found.append(row)
        else:
            found += [Row(row.file, n, values) for n, values in enumerate(sentences, 1)]
    return found


def _published(caption: Caption, rows: list[Row], file: str, reading: Reading) -> Extracted:
    """The first row of an image that nobody has taken yet."""
    if not rows:
        raise MmpoError(f"{file}: has no objects of the description of image {caption.image}")
    row = rows.pop(0)
    text = row.get("caption")
    if text is not None and str(text).strip() != caption.text:
        raise MmpoError(
            f"{row.name}: is about {text!r:.60}, and the description is {caption.text!r:.60}"
        )
    nouns = row.get("objs", "words")
    if nouns is not None:
        return Extracted(names=_listed(row, row.get("extract_objs")), nouns=_listed(row, nouns))
    names = ("extract_objs", "objects", *REVIEWS)
    listed: Any = row.get(*names)
    if listed is None and any(name in row.values for name in names):
        return Extracted()
    listed = row.need(*names)
    if isinstance(listed, str):
        return Extracted(read_objects(listed, reading), reply=listed)
    return Extracted(_listed(row, listed))


def _listed(row: Row, names: Any) -> list[str] | None:
    if names is not None and not isinstance(names, list):
        raise MmpoError(f"{row.name}: the objects are no list but {names!r:.60}")
    return names
