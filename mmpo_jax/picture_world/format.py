"""Rows of the picture world's TFDS data set: a caption and questions about one image."""

from typing import Any

from mmpo_jax.data.formats.format import Draft, DraftResponse, Format, read_list, read_text, rest
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.turns import parse_turns
from mmpo_jax.data.formats.writing import CannotHold, Writer
from mmpo_jax.data.records import Record
from mmpo_jax.data.rows import MessagesAs, Row
from mmpo_jax.data.skipped import UnusableRow


def _claims(row: Row) -> bool:
    return "caption_prompt" in row and "caption" in row


def _read(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    """A scene as prompt and caption; as "dialogue", with the questions and their answers too."""
    prompt = parse_turns(read_text(row.get("caption_prompt"), "caption_prompt"), "user")
    caption = parse_turns(read_text(row.get("caption"), "caption"), "assistant")
    images, extra = media.images(row), rest(row, "caption_prompt", "caption")
    if messages_as == "last_turn":
        return Draft(prompt, (DraftResponse(caption),), images, extra=extra)
    questions = row.get("questions", [])
    if not isinstance(questions, list):
        raise UnusableRow("bad_message", "questions is not a list")
    answers = read_list(row.get("answers", []), "answers", len(questions), "bad_message")
    asked = tuple(
        parse_turns(read_text(question, "questions"), "user")
        + parse_turns(read_text(answer, "answers"), "assistant")
        for question, answer in zip(questions, answers, strict=True)
    )
    return Draft((), tuple(DraftResponse(turns) for turns in (prompt + caption, *asked)), images)


def _write(record: Record, writer: Writer) -> dict[str, Any]:
    raise CannotHold("responses", detail="rows of the picture world come from its builder")


FORMAT = Format("picture_world", _claims, _read, _write, frozenset())
