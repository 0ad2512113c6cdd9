"""Responses as a reward model reads them: to their end, with a critique behind each that has one.

    prompt   response   what asks for the critique   critique EOS
                                                              ^ here the head reads

The critique is the assistant's next answer. A record's responses share its prompt, each with its
own further turns, so an image is encoded once for all of them and for all critiques of each.

MM-RLHF's released code has another layout, `one_turn`, in which each has a prompt of its own:

    what asks for the critique, question and response in it   critique EOS
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool

from mmpo_jax.core.prompts import fill
from mmpo_jax.data.contexts import tokenize_contexts
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import IMAGE, VIDEO, Record, Response, Turn
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import UNLIMITED, TokenizedRecord, TokenizedResponse, tokenize
from mmpo_jax.objectives.registry import Scored


def tokenize_scored(
    record: Record, processor: Processor, max_prompt: int, max_response: int, *, scored: Scored
) -> TokenizedRecord:
    """Tokenizes a record for a reward head, which reads the last token of every response.

    That is the EOS behind the critique, or behind the response where it has none: what generation
    cut has an EOS too, as a reward model has never seen anything else. The loss mask holds the
    critique, EOS included, and of a response without one that last token alone, for which nothing
    is learned.

    Args:
      record, processor, max_prompt, max_response: see `tokenize`.
      scored: how critiques are asked for. An empty critique counts as none.

    Raises:
      UnusableRow: see `tokenize_contexts` and `evaluation`; or a response would lose its end.
    """
    responses = tuple(_going_on(record, one, scored) for one in record.responses)
    prepared = dataclasses.replace(record, responses=responses)
    row = tokenize_contexts(prepared, processor, max_prompt, UNLIMITED)
    return _masked(row, processor, max_response, scored.markers)


def tokenize_asked(record: Record, processor: Processor, scored: Scored) -> TokenizedRecord:
    """A record whose responses end where their critiques begin, token by token as
    `tokenize_scored` has them; nothing is cut.

    Args:
      record: with responses; in `one_turn` with one, which becomes part of the prompt.
      processor: of the reward model.
      scored: how critiques are asked for.

    Raises:
      UnusableRow: see `tokenize` and `evaluation`.
    """
    prompt = scored.critique_prompt
    assert prompt is not None
    if scored.layout == "one_turn":
        (response,) = record.responses
        return tokenize(evaluation(record, response, prompt), processor, UNLIMITED, UNLIMITED)
    responses = tuple(
        dataclasses.replace(
            response,
            turns=(*response.turns, Turn("user", prompt)),
            finished=True,
            spans=(),
            token_ids=None,
        )
        for response in record.responses
    )
    asked = dataclasses.replace(record, responses=responses)
    return tokenize(asked, processor, UNLIMITED, UNLIMITED)


def evaluation(record: Record, response: Response, prompt: str) -> Record:
    """A response as part of the question for its critique, to which nothing is answered yet.

    Args:
      record: of the response.
      response: one answer to one question.
      prompt: with {question} and {response} in it.

    Raises:
      UnusableRow: question or response have several turns.
    """
    turns = record.prompt if response.prompt is None else response.prompt
    before = tuple(turn for turn in turns if turn.role in ("system", "developer"))
    if [turn.role for turn in turns[len(before) :]] != ["user"] or len(response.turns) > 1:
        detail = "a prompt that holds question and response holds one of each"
        raise UnusableRow("several_turns", detail)
    text = fill(prompt, question=turns[-1].text, response=response.text)
    images = record.images if response.images is None else response.images
    shown = (*[IMAGE] * len(images), *[VIDEO] * len(record.videos))
    asked = Turn("user", (*shown, text) if shown else text)
    return dataclasses.replace(record, images=images, prompt=(*before, asked), responses=())


def _going_on(record: Record, response: Response, scored: Scored) -> Response:
    """The response with its critique, if it has one that is read: as further turns, or in place of
    the response behind a prompt of its own."""
    prompt = scored.critique_prompt
    plain = dataclasses.replace(response, finished=True, spans=(), critique=None)
    if prompt is None or not response.critique:
        return plain
    if scored.layout == "one_turn":
        asked = evaluation(record, response, prompt).prompt
        said = (Turn("assistant", response.critique),)
        return dataclasses.replace(plain, turns=said, prompt=asked, critique=response.critique)
    before = (dataclasses.replace(turn, learned=False) for turn in response.turns)
    turns = (*before, Turn("user", prompt), Turn("assistant", response.critique))
    return dataclasses.replace(plain, turns=turns, critique=response.critique)


def _masked(
    row: TokenizedRecord, processor: Processor, limit: int, markers: bool
) -> TokenizedRecord:
    """The record, in all its contexts, with the loss masks of `tokenize_scored`."""
    made = tuple(_with_mask(response, processor, limit, markers) for response in row.responses)
    others = tuple((name, _masked(one, processor, limit, markers)) for name, one in row.others)
    return dataclasses.replace(row, responses=made, others=others)


def _with_mask(
    response: TokenizedResponse, processor: Processor, limit: int, markers: bool
) -> TokenizedResponse:
    length = len(response.ids)
    if not length:  # it stands in another context
        return response
    if length > limit:
        raise UnusableRow(
            "response_too_long",
            f"{length} tokens with its critique, the limit is {limit}, and a reward is read at the "
            "end",
        )
    if response.source.critique is None:
        return dataclasses.replace(response, loss_mask=_last(length))
    mask = response.loss_mask
    if markers:
        mask = mask | marker_mask(response.ids, processor)
    return dataclasses.replace(response, loss_mask=mask, criticised=True)


def _last(length: int) -> Bool[np.ndarray, " t"]:
    return np.arange(length) == length - 1


def marker_mask(ids: np.ndarray, processor: Processor) -> Bool[np.ndarray, " t"]:
    """bool[t]: which tokens are control tokens, other than those of media, or white space directly
    behind one, such as ChatML's line break."""
    special = set(processor.tokenizer.all_special_ids) - {*processor.placeholders}
    control = np.isin(ids, sorted(special))
    behind = np.concatenate([[False], control[:-1]])
    blank = np.array([not processor.decode([token]).strip() for token in ids.tolist()], bool)
    return control | (behind & blank & ~np.isin(ids, processor.placeholders))
