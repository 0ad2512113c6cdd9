"""TRL's rows, conversational and plain, with explicit and implicit prompts.

* the prompt: ``prompt`` or ``question``, text or messages; ``system`` goes in front of it;
* the responses: ``chosen`` and ``rejected``, which may be whole dialogues; or ``completion``, with
  ``label`` for KTO; or ``responses`` with any number of them, each text or messages; none of these
  in a row whose responses are still to be generated. ``finished`` and ``response_ids`` beside
  ``responses``, as `mmpo generate` writes them, say which of them end by themselves, and the tokens
  of each;
* or ``messages``, a dialogue to learn from.

``tools``, ``documents`` and ``chat_template_kwargs`` go to the chat template.

Pairs may have scores: ``score_chosen`` and ``score_rejected``, or ``margin``, their difference.
"""

import dataclasses
import functools
import re
from typing import Any

from mmpo_jax.data.formats.format import (
    Draft,
    DraftResponse,
    Format,
    draft_of,
    read_flag,
    read_list,
    read_number,
)
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.turns import (
    Message,
    Turns,
    parse_turns,
    split_last_answer,
    with_system,
)
from mmpo_jax.data.formats.whole_dialogues import split_answer, split_pair
from mmpo_jax.data.formats.writing import (
    MESSAGES,
    CannotHold,
    Writer,
    chosen_and_rejected,
    messages,
    template_columns,
    with_extra,
)
from mmpo_jax.data.records import SCORE, Record
from mmpo_jax.data.rows import MessagesAs, Row
from mmpo_jax.data.skipped import UnusableRow

SCORES = ("score_chosen", "score_rejected", "margin")
"""Columns with the scores of a pair."""
_COLUMNS = ("prompt", "question", "chosen", "rejected", "completion", "label", "responses")
_SAMPLED = ("finished", "response_ids")
"""Columns beside ``responses``."""


def _claims(row: Row) -> bool:
    return any(name in row for name in (*_COLUMNS, "messages"))


def _read(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    prompt, responses = _prompt_and_responses(row, messages_as)
    used = [name for name in (*_COLUMNS, *_SAMPLED, "system") if name in row]
    unread = [] if _reads_responses(row) else ["responses", *_SAMPLED]
    if "chosen" in row:
        unread += ["completion", "label"]
    elif "completion" not in row:
        unread.append("label")
    if _ids_of_others(row):
        unread.append("response_ids")
    used = [name for name in used if name not in unread]
    if not any(name in row for name in _COLUMNS):
        used.append("messages")
    if "chosen" in row:
        used += SCORES
        # UltraFeedback's rows repeat their chosen dialogue here.
        if row.get("messages") == row["chosen"]:
            used.append("messages")
    if "prompt" in row and "question" in row:
        used.remove("question")
    return draft_of(row, media, prompt, responses, used, samples="responses" in row)


def _reads_responses(row: Row) -> bool:
    """Whether the responses are those of ``responses``, which other columns come before."""
    return "responses" in row and "chosen" not in row and "completion" not in row


def _prompt_and_responses(
    row: Row, messages_as: MessagesAs
) -> tuple[Turns, tuple[DraftResponse, ...]]:
    if ("chosen" in row) != ("rejected" in row):
        raise UnusableRow("incomplete_pair", "chosen and rejected belong together")
    prompt = parse_turns(row.get("prompt", row.get("question", [])), "user")
    if "chosen" in row:
        prompt, chosen, rejected = _pair(row, prompt)
        return with_system(row, prompt), scored_pair(row, chosen, rejected)
    if "completion" in row:
        fields = {"desirable": read_flag(row["label"], "label")} if "label" in row else {}
        prompt, answer = split_answer(prompt, parse_turns(row["completion"], "assistant"))
        return with_system(row, prompt), (DraftResponse(answer, fields=fields),)
    if "responses" in row:
        prompt, responses = _behind(prompt, _several(row))
        return with_system(row, prompt), responses
    if prompt:
        return with_system(row, prompt), ()
    if "messages" not in row:
        columns = ", ".join(sorted(row)) or "none"
        raise UnusableRow("no_prompt", f"neither a prompt nor messages; columns: {columns}")
    return supervised(with_system(row, parse_turns(row["messages"], "user")), messages_as)


def _pair(row: Row, prompt: Turns) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected) of a pair, whose responses may be whole dialogues.

    Raises:
      UnusableRow: the prompt is not what the dialogues begin with.
    """
    texts = row["chosen"], row["rejected"]
    if not prompt and all(isinstance(text, str) and HUMAN in text for text in texts):
        chosen, rejected = (_transcript(text) for text in texts)
    else:
        chosen, rejected = (parse_turns(text, "assistant") for text in texts)
    return split_pair(prompt, chosen, rejected)


HUMAN = "\n\nHuman:"
"""Speaks first in the transcripts of Anthropic's HH-RLHF."""


def _transcript(text: str) -> Turns:
    """The turns of a dialogue that is written as one text, "Human:" and "Assistant:" by turns; a
    space behind the colon is none of what is said."""
    pieces = re.split(r"\n\n(Human|Assistant):[ ]?", text)
    if pieces[0].strip():
        raise UnusableRow("bad_message", f"a transcript that begins with {pieces[0][:80]!r}")
    return tuple(
        Message("user" if speaker == "Human" else "assistant", said)
        for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)
    )


def pair(chosen: Turns, rejected: Turns) -> tuple[DraftResponse, DraftResponse]:
    """The better response and the worse one."""
    return DraftResponse(chosen, fields={"rank": 1}), DraftResponse(rejected, fields={"rank": 2})


def scored_pair(row: Row, chosen: Turns, rejected: Turns) -> tuple[DraftResponse, ...]:
    """`pair` with the row's scores.

    Raises:
      UnusableRow: see `pair_scores`.
    """
    return tuple(
        dataclasses.replace(response, fields={**response.fields, "scores": score})
        for response, score in zip(pair(chosen, rejected), pair_scores(row), strict=True)
    )


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


def supervised(turns: Turns, messages_as: MessagesAs) -> tuple[Turns, tuple[DraftResponse, ...]]:
    """The prompt and the response of a dialogue to learn from.

    Raises:
      UnusableRow: the dialogue does not end with an answer.
    """
    if messages_as == "dialogue":
        return (), (DraftResponse(turns),)
    prompt, answer = split_last_answer(turns)
    return prompt, (DraftResponse(answer),)


def _several(row: Row) -> tuple[DraftResponse, ...]:
    responses = row["responses"]
    if not isinstance(responses, list):
        raise UnusableRow("bad_message", "responses is not a list")
    count = len(responses)
    flags = read_list(row.get("finished", [True] * count), "finished", count, "bad_message")
    if not all(isinstance(flag, bool) for flag in flags):
        raise UnusableRow("bad_message", f"finished {str(flags)[:80]} is no list of true and false")
    sampled = [None] * count if _ids_of_others(row) else row.get("response_ids", [None] * count)
    return tuple(map(_sample, responses, flags, sampled))


def _ids_of_others(row: Row) -> bool:
    """Whether ``response_ids`` are of responses that are no longer those that were sampled."""
    ids, responses = row.get("response_ids"), row.get("responses")
    if ids is None or not isinstance(responses, list):
        return False
    return not isinstance(ids, list) or len(ids) != len(responses)


def _behind(
    prompt: Turns, responses: tuple[DraftResponse, ...]
) -> tuple[Turns, tuple[DraftResponse, ...]]:
    """(prompt, responses) where responses may be whole dialogues: the prompt is that of the first
    one which can be used, and responses behind another are left out."""
    found: Turns | None = None
    split = []
    for response in responses:
        try:
            before, turns = split_answer(prompt, response.turns)
            if response.problem is None and before != (found or before):
                detail = "a whole dialogue with another prompt than the first response's"
                raise UnusableRow("prompt_differs", detail)
        except UnusableRow as problem:
            split.append(DraftResponse((), problem=problem))
            continue
        if response.problem is None:
            found = before
        split.append(dataclasses.replace(response, turns=turns))
    return found or prompt, tuple(split)


def _sample(value: Any, finished: bool, ids: Any) -> DraftResponse:
    try:
        fields = {"finished": finished, "token_ids": read_tokens(ids)}
        return DraftResponse(parse_turns(value, "assistant"), fields=fields)
    except UnusableRow as problem:
        return DraftResponse((), problem=problem)


def read_tokens(value: Any) -> tuple[int, ...] | None:
    """The ids of a response's tokens; None where there are none.

    Raises:
      UnusableRow: they are no list of whole numbers.
    """
    if value is None:
        return None
    whole = isinstance(value, list) and all(type(number) is int for number in value)
    if not whole or not value or min(value) < 0:
        raise UnusableRow("bad_token", f"response_ids {str(value)[:80]} are no list of token ids")
    return tuple(value)


def _write(record: Record, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **writer.media(record)}
    row |= template_columns(record, as_text=writer.embed == "bytes")
    if record.source is not None:
        row["source"] = record.source
    responses = record.responses
    # A column of Parquet cannot hold texts in one row and parts in another.
    columns = writer.embed == "bytes"
    said = functools.partial(messages, record=record, tags=columns, by_column=columns)
    if not record.prompt and len(responses) == 1:
        return with_extra(row | {"messages": said(responses[0].turns)}, record.extra, writer)
    if record.prompt:
        row["prompt"] = said(record.prompt)
    answer = functools.partial(said, behind=record.prompt)
    if any(response.scores for response in responses):
        row |= _written_scores(record)
    if record.ranked:
        chosen, rejected = chosen_and_rejected(record)
        row |= {
            "chosen": answer(chosen.turns),
            "rejected": answer(rejected.turns),
        }
    elif len(responses) == 1 and responses[0].finished and responses[0].token_ids is None:
        row["completion"] = answer(responses[0].turns)
        if responses[0].desirable is not None:
            row["label"] = responses[0].desirable
    elif responses:
        row["responses"] = [answer(response.turns) for response in responses]
        row["finished"] = [response.finished for response in responses]
        if any(response.token_ids is not None for response in responses):
            row["response_ids"] = [r.token_ids and list(r.token_ids) for r in responses]
        if any(response.desirable is not None for response in responses):
            raise CannotHold("desirable", detail="a row with a label holds one finished completion")
    if "responses" not in row:
        if not all(response.finished for response in responses):
            raise CannotHold("finished", detail="of a chosen and a rejected response")
        if any(response.token_ids is not None for response in responses):
            raise CannotHold("token_ids", detail="of a chosen and a rejected response")
    return with_extra(row, record.extra, writer)


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
    holds=MESSAGES
    | {"source", "videos", "fps", "seconds", "extra", "finished", "rank", "scores", "desirable"}
    | {"token_ids"},
)
