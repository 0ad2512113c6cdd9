"""Rows that are left out: why, which, how many a run allows, and the file that lists them."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import write_atomic

SKIPPED_FILE = "rejected_rows.jsonl"
"""Name of the file of rows that were left out, with reasons; where a run has a folder, in it."""

SkipReason = Literal[
    "alike_answers",  # of which one says all that the other does, where a rule corrects them
    "bad_id",  # neither a text nor a whole number
    "bad_image_entry",  # neither a path nor bytes
    "bad_json",  # the line, or a column that holds JSON, is no JSON object
    "bad_label",  # a verdict that is neither true nor false
    "bad_log_prob",  # no finite number; or over 0, where those per token are learned from
    "bad_message",  # a message without a known role or with unknown content
    "bad_rank",  # no whole number from 1 on
    "bad_score",  # no finite number
    "bad_span",  # no range of characters of the response's last answer
    "bad_token",  # ids of sampled tokens that are no list of whole numbers
    "bad_text",  # text that is no valid Unicode, or has characters that are used here
    "bad_video_entry",  # no file, no frames of one size, or a rate that is no positive number
    "empty_prompt",  # a user turn that says nothing and shows nothing
    "empty_response",
    "dialogues_differ",  # responses that do not go on from one rendered prompt
    "image_broken",  # empty, truncated, not an image
    "image_count",  # the chat template does not show every image
    "image_missing",
    "image_outside_folder",
    "image_position",  # an image in an answer
    "image_size",  # a sound one that is too narrow or small for the model
    "image_url",  # a picture in the web; nothing is downloaded
    "image_too_large",  # more pixels than it is safe to decode
    "incomplete_pair",  # chosen without rejected, or the other way round
    "own_images",  # of a response: not taken where the row is used
    "own_prompt",  # the same of the prompt
    "own_videos",  # responses that show different videos
    "long_answer",  # more words than a rule corrects
    "not_corrected",  # a language model did not say what is wrong in a way that could be read
    "no_dialogue",  # nothing after the first answer, where corrections are learned from
    "no_error",  # nothing to correct in a rejected response
    "media_option",  # a key of an image or a video that would change what is shown of it
    "no_answer",  # nothing that the rewards could compare responses with
    "no_label",  # a response without a verdict, where they are learned from
    "no_other_image",  # none to change, and none given
    "no_reference",  # a response without a reference's log-prob, where the data are to give it
    "no_score",  # a response without a score, where they are learned from
    "no_prompt",  # neither a prompt nor messages
    "placeholder_count",  # more or fewer places for images than images
    "prompt_too_long",  # over the largest bucket; its image tokens are never cut
    "prompt_differs",  # from the beginning of the whole dialogues that are given as answers
    "question_too_long",
    "response_too_long",  # over the largest bucket, with images or the end that is scored beyond it
    "no_critique",  # a response without one, where the data are to give it
    "no_spans",  # no part of a response is marked, where these are learned from
    "span_not_found",  # the chat template changes the text that spans are of
    "template_refuses",  # the chat template does not take such a dialogue
    "rank_count",  # ranks and responses differ in number
    "same_responses",  # chosen equals rejected as training sees them, maybe where they were cut
    "several_turns",  # a prompt or a response of several turns, where pairs become questions
    "score_count",  # scores and responses differ in number
    "turn_order",  # a prompt in which nobody asks anything
    "unfinished",  # a response that was cut, where something is to follow it
    "undesirable",  # a response that sft would learn
    "unsupported_image",  # the model takes none
    "unsupported_video",  # the model, or an alignment's labeler, takes no videos
    "video_length",  # a sound one of too few frames for the model, or too many
]

Problem = tuple[SkipReason, str]
"""Why a row is left out: a word to count by, and what exactly is wrong, for a person."""


class UnusableRow(Exception):
    """A row that has to be left out."""

    def __init__(self, reason: SkipReason, detail: str):
        """
        Args:
          reason: word that it is counted under.
          detail: what exactly is wrong, for a person.
        """
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


MaybeRow = dict[str, Any] | UnusableRow
"""A row as a file has it, or what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class SkippedRow:
    """A row that is left out."""

    file: str
    row: int | None
    """Number in its file from 1; the line number in JSONL. None where the row is from no file."""
    id: str
    """The row's id, or empty where the row could not be read so far."""
    reason: SkipReason
    """Word to count by, which stays the same."""
    detail: str
    """What exactly is wrong, for a person."""

    def __str__(self) -> str:
        names = [f"row {self.row}"] if self.row is not None else []
        names += [f"id {self.id!r}"] if self.id else []
        return f"{', '.join(names)}: {self.reason}: {self.detail}"


def check_skipped(skipped: Sequence[SkippedRow], total: int, max_share: float) -> None:
    """Refuse data of which too large a share was left out.

    Raises:
      DataError: more than `max_share` of `total` rows are in `skipped`, or there are no rows. The
        message counts the reasons and shows the first few rows.
    """
    if total == 0:
        raise DataError("the data has no rows")
    if len(skipped) <= max_share * total:
        return
    counts = Counter(row.reason for row in skipped).most_common()
    lines = [
        f"{len(skipped)} of {total} rows cannot be used, more than the allowed {max_share:.1%}: "
        + ", ".join(f"{reason} {count}" for reason, count in counts)
    ]
    lines += [f"  {row.file}: {row}" for row in skipped[:5]]
    raise DataError("\n".join(lines))


def write_skipped(path: epath.PathLike, skipped: Iterable[SkippedRow]) -> None:
    """Write skipped rows as JSONL, one object with the fields of `SkippedRow` a line.

    Raises:
      OSError: the file could not be written.
    """
    lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in skipped]
    write_atomic(path, "".join(lines).encode())
