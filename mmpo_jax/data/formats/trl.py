"""TRL's rows, conversational and plain, with explicit and implicit prompts.

* the prompt: ``prompt`` or ``question``, text or messages;
* the responses: ``chosen`` and ``rejected``; or ``completion``, with ``label`` for KTO; or
  ``responses`` with any number of them, each text or messages; none of these in a row whose
  responses are still to be generated. ``finished`` beside ``responses``, as `mmpo generate` writes
  it, says which of them end by themselves;
* or ``messages``, a dialogue to learn from.

Pairs may have scores: ``score_chosen`` and ``score_rejected``, or ``margin``, their difference.
"""

import dataclasses
from typing import Any

from mmpo_jax.data.formats.format import (
    Answer,
    Draft,
    Format,
    read_flag,
    read_list,
    read_number,
    rest,
    source_of,
)
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.turns import (
    Turns,
    check_prompt,
    parse_turns,
    split_common_prompt,
    split_last_answer,
)
from mmpo_jax.data.formats.writing import (
    CannotHold,
    Writer,
    chosen_and_rejected,
    messages,
    with_extra,
)
from mmpo_jax.data.records import SCORE, Record
from mmpo_jax.data.rows import MessagesAs, Row, UnusableRow

SCORES = ("score_chosen", "score_rejected", "margin")
"""Columns with the scores of a pair."""
_COLUMNS = ("prompt", "question", "chosen", "rejected", "completion", "label", "responses")


def _claims(row: Row) -> bool:
    return any(name in row for name in (*_COLUMNS, "messages"))


def _read(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    prompt, answers = _prompt_and_answers(row, messages_as)
    used = [name for name in (*_COLUMNS, "finished") if name in row]
    if not any(name in row for name in _COLUMNS):
        used.append("messages")
    if "chosen" in row:
        used += SCORES
    if "prompt" in row and "question" in row:
        used.remove("question")
    return Draft(
        prompt=prompt,
        answers=answers,
        images=media.images(row),
        videos=media.videos(row),
        source=source_of(row),
        extra=rest(row, *used),
    )


def _prompt_and_answers(row: Row, messages_as: MessagesAs) -> tuple[Turns, tuple[Answer, ...]]:
    if ("chosen" in row) != ("rejected" in row):
        raise UnusableRow("incomplete_pair", "chosen and rejected belong together")
    prompt = parse_turns(row.get("prompt", row.get("question", [])), "user")
    if "chosen" in row:
        chosen, rejected = (parse_turns(row[key], "assistant") for key in ("chosen", "rejected"))
        if not prompt:
            prompt, chosen, rejected = split_common_prompt(chosen, rejected)
        scores = pair_scores(row)
        return prompt, tuple(
            dataclasses.replace(answer, fields={**answer.fields, "scores": score})
            for answer, score in zip(pair(chosen, rejected), scores, strict=True)
        )
    if "completion" in row:
        fields = {"desirable": read_flag(row["label"], "label")} if "label" in row else {}
        return prompt, (Answer(parse_turns(row["completion"], "assistant"), fields=fields),)
    if "responses" in row:
        return prompt, _several(row)
    if prompt:
        check_prompt(prompt)
        return prompt, ()
    if "messages" not in row:
        columns = ", ".join(sorted(row)) or "none"
        raise UnusableRow("no_prompt", f"neither a prompt nor messages; columns: {columns}")
    return supervised(parse_turns(row["messages"], "user"), messages_as)


def pair(chosen: Turns, rejected: Turns) -> tuple[Answer, Answer]:
    """The better response and the worse one."""
    return Answer(chosen, fields={"rank": 1}), Answer(rejected, fields={"rank": 2})


def pair_scores(row: Row) -> tuple[dict[str, float], dict[str, float]]:
    """The scores of the better response and of the worse one; of a mere ``margin`` the worse one's
    is 0.

    Raises:
      UnusableRow: one has no score and the other has, or they are no numbers.
    """
    given = [name for name in SCORES[:2] if name in row]
    if len(given) == 1:
        raise UnusableRow("score_count", f"{given[0]} alone; a pair has two scores")
    if given:
        chosen, rejected = (read_number(row[name], name) for name in given)
    elif "margin" in row:
        chosen, rejected = read_number(row["margin"], "margin"), 0.0
    else:
        return {}, {}
    return {SCORE: chosen}, {SCORE: rejected}


def supervised(turns: Turns, messages_as: MessagesAs) -> tuple[Turns, tuple[Answer, ...]]:
    """The prompt and the response of a dialogue to learn from.

    Raises:
      UnusableRow: the dialogue does not end with an answer.
    """
    if messages_as == "dialogue":
        return (), (Answer(turns),)
    prompt, answer = split_last_answer(turns)
    return prompt, (Answer(answer),)


def _several(row: Row) -> tuple[Answer, ...]:
    responses = row["responses"]
    if not isinstance(responses, list):
        raise UnusableRow("bad_message", "responses is not a list")
    flags = row.get("finished")
    if flags is None:
        flags = [True] * len(responses)
    flags = read_list(flags, "finished", len(responses), "bad_message")
    if not all(isinstance(flag, bool) for flag in flags):
        raise UnusableRow("bad_message", f"finished {str(flags)[:80]} is no list of true and false")
    return tuple(
        Answer(parse_turns(turns, "assistant"), fields={"finished": flag})
        for turns, flag in zip(responses, flags, strict=True)
    )


def _write(record: Record, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **writer.media(record)}
    if record.source is not None:
        row["source"] = record.source
    responses = record.responses
    if not record.prompt and len(responses) == 1:
        return with_extra(row | {"messages": messages(responses[0].turns)}, record.extra)
    if record.prompt:
        row["prompt"] = messages(record.prompt)
    if any(response.scores for response in responses):
        row |= _written_scores(record)
    if record.ranked:
        chosen, rejected = chosen_and_rejected(record)
        row |= {"chosen": messages(chosen.turns), "rejected": messages(rejected.turns)}
    elif len(responses) == 1 and responses[0].finished:
        row["completion"] = messages(responses[0].turns)
        if responses[0].desirable is not None:
            row["label"] = responses[0].desirable
    elif responses:
        row["responses"] = [messages(response.turns) for response in responses]
        row["finished"] = [response.finished for response in responses]
        if any(response.desirable is not None for response in responses):
            raise CannotHold("desirable", detail="a row with a label holds one finished completion")
    if "responses" not in row and not all(response.finished for response in responses):
        raise CannotHold("finished", detail="of a chosen and a rejected response")
    return with_extra(row, record.extra)


def _written_scores(record: Record) -> dict[str, float]:
    """Columns with the scores of a pair, and their difference for TRL's reward trainer."""
    if not record.ranked or any(r.scores.keys() != {SCORE} for r in record.responses):
        raise CannotHold("scores", detail=f"a row holds those of a pair, one each, called {SCORE}")
    chosen, rejected = (response.scores[SCORE] for response in chosen_and_rejected(record))
    return dict(zip(SCORES, (chosen, rejected, chosen - rejected), strict=True))


FORMAT = Format(
    name="trl",
    claims=_claims,
    read=_read,
    write=_write,
    holds=frozenset(
        {"source", "videos", "fps", "system", "extra", "finished", "rank", "scores", "desirable"}
    ),
)
