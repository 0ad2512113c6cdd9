"""A row of a data file, and the reasons for which one is left out."""

from collections.abc import Mapping
from typing import Any, Literal

SkipReason = Literal[
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
    "bad_video_entry",  # no list of frames of one size, or a rate that is no positive number
    "empty_prompt",  # a user turn that says nothing and shows nothing
    "empty_response",
    "dialogues_differ",  # responses that do not go on from one rendered prompt
    "image_broken",  # empty, truncated, not an image, too narrow
    "image_count",  # the chat template does not show every image
    "image_missing",
    "image_outside_folder",
    "image_position",  # an image in an answer
    "image_url",  # a picture in the web; nothing is downloaded
    "image_too_large",  # more pixels than it is safe to decode
    "incomplete_pair",  # chosen without rejected, or the other way round
    "own_images",  # of a response: not taken where the row is used
    "own_prompt",  # the same of the prompt
    "own_videos",  # responses that show different videos
    "no_dialogue",  # nothing after the first answer, where corrections are learned from
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
    "response_too_long",  # over the largest bucket, with images beyond it
    "no_spans",  # no part of a response is marked, where these are learned from
    "span_not_found",  # the chat template changes the text that spans are of
    "template_refuses",  # the chat template does not take such a dialogue
    "rank_count",  # ranks and responses differ in number
    "same_responses",  # chosen equals rejected as training sees them, maybe where they were cut
    "score_count",  # scores and responses differ in number
    "turn_order",  # a prompt in which nobody asks anything
    "undesirable",  # a response that sft would learn
    "unsupported_image",  # the model takes none
    "unsupported_video",  # the model, or an alignment's labeler, takes no videos
]
Format = Literal[
    "auto",
    "record",
    "trl",
    "llama_factory",
    "ms_swift",
    "rlaif_v",
    "rlhf_v",
    "mm_rlhf",
    "mm_rlhf_pairs",
    "picture_world",
    "alpaca",
]
"""Conventions of rows, as recipes and flags name them; `auto` goes by the columns."""

MessagesAs = Literal["last_turn", "dialogue"]
"""What a row of whole dialogues supervises, see `mmpo_jax.data.readers.iter_records`."""

_BRIEF = 80
"""Characters of a value that a message may repeat."""

Row = Mapping[str, Any]
"""Columns -> values, without those that are null: Parquet has all columns in all rows."""


class UnusableRow(Exception):
    """The row has to be left out; caught by the readers and never seen by their callers."""

    def __init__(self, reason: SkipReason, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def brief(value: Any) -> str:
    """How messages call a value of a row: never with a picture's bytes or all of a long text."""
    if isinstance(value, str):
        head = value.partition(",")[0] + "," if value[:5].lower() == "data:" else value
        if len(value) <= _BRIEF:
            return repr(value)
        return f"{head[: _BRIEF // 2]!r}... ({len(value)} characters)"
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return f"an object of {', '.join(map(str, value))[:_BRIEF] or 'nothing'}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return repr(value)[:_BRIEF]
