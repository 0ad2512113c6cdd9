"""`mmpo data check`: what is in a data file, and which of its rows cannot be used."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from mmpo_jax.checkpoints.checkpoint import load_processor
from mmpo_jax.core.files import fingerprint_bytes
from mmpo_jax.core.progress import counted
from mmpo_jax.data.batching import fitting_sizes
from mmpo_jax.data.contexts import (
    all_contexts,
    differ,
    differs,
    filled_responses,
    tokenize_contexts,
)
from mmpo_jax.data.images import image_size
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.media_check import media_problem
from mmpo_jax.data.notes import Notes, shows_something
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.readers import iter_records
from mmpo_jax.data.records import ImageRef, Record, VideoRef
from mmpo_jax.data.skipped import SkippedRow, UnusableRow
from mmpo_jax.data.tally import TextNotes
from mmpo_jax.data.tokenization import UNLIMITED
from mmpo_jax.data.usable import unsupported, without_shown_media
from mmpo_jax.data.videos import shown_range, video_facts

_SHOWN = 3
"""Examples of each thing that is found."""
_NAMED = 50
"""Numbers of rows that are named beside these."""
_BAR = 40
"""Characters of the longest bar of a histogram."""


@dataclasses.dataclass
class Findings:
    """What reading the rows brings up."""

    notes: Notes = dataclasses.field(default_factory=Notes)
    texts: TextNotes = dataclasses.field(default_factory=TextNotes)
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    """Pairs, rankings and so on."""
    dropped: list[SkippedRow] = dataclasses.field(default_factory=list)
    prompts: list[int] = dataclasses.field(default_factory=list)
    responses: list[int] = dataclasses.field(default_factory=list)
    """Lengths, of the rows that can be used."""
    sizes: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    """(width, height) of images."""
    frame_sizes: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    """The same of videos, once each."""
    frames: list[int] = dataclasses.field(default_factory=list)
    """Numbers of frames of videos, of files all that may be shown."""
    rates: list[float] = dataclasses.field(default_factory=list)
    """Frames a second of those where it is known."""
    duplicates: list[tuple[int | None, int | None]] = dataclasses.field(default_factory=list)
    """(row, the earlier row that says the same)."""
    without_media: int = 0
    """Usable rows that show nothing."""
    same_responses: list[int | None] = dataclasses.field(default_factory=list)
    """Rows that training leaves out where it compares responses, as none is another one."""


def main(options: argparse.Namespace) -> None:
    processor = load_processor(options.model, options.template) if options.model else None
    report = check_data(
        options.file,
        format=options.format,
        image_root=options.image_root,
        processor=processor,
        control_tokens=options.control_tokens,
        prompt_sizes=options.prompt_sizes,
        response_sizes=options.response_sizes,
    )
    print(report)


def check_data(
    path: str,
    *,
    format: str = "auto",
    image_root: str | None = None,
    processor: Processor | None = None,
    control_tokens: str = "tokens",
    prompt_sizes: Sequence[int] = (),
    response_sizes: Sequence[int] = (),
) -> str:
    """A report on a data file; every image is decoded.

    Args:
      path: see `mmpo_jax.data.readers.iter_records`.
      format: one of `FORMATS`, or "auto".
      image_root: the folder of the images.
      processor: of the checkpoint whose tokens count; characters of the texts without.
      control_tokens: what typed control tokens are, as in a recipe's `data`: "tokens" or "text".
      prompt_sizes, response_sizes: ascending bucket sizes; chosen from the data where empty.

    Raises:
      DataError: the file cannot be read.
    """
    findings = Findings()
    rows_of: dict[str, int | None] = {}
    limits = _limit(prompt_sizes), _limit(response_sizes)
    cut = 0
    rows = iter_records(path, image_root, format=format, notes=findings.notes)
    for item in counted(rows, f"checking {path}"):
        if isinstance(item, SkippedRow):
            findings.dropped.append(item)
            continue
        item = dataclasses.replace(item, plain_text=control_tokens == "text")
        problem = media_problem(item)
        if problem is None and processor is not None:
            told = len(item.left_out)
            item = without_shown_media(item, processor)
            if len(item.left_out) > told:
                findings.notes.left_out["image_position"] += len(item.left_out) - told
            problem = unsupported(item, processor)
        if problem is None:
            try:
                prompt, responses, same = _measure(item, processor, *limits)
            except UnusableRow as error:
                problem = error.reason, error.detail
        if problem is not None:
            findings.dropped.append(SkippedRow(path, item.row, item.id, *problem))
            continue
        findings.prompts.append(prompt)
        findings.responses += responses
        cut += sum(length > limits[1] for length in responses)
        findings.kinds[_kind(item)] += 1
        if processor is not None:
            findings.texts.add(item, processor)
        findings.without_media += not shows_something(item)
        findings.sizes.update(image_size(image)[::-1] for image in _pictures(item))
        for video in item.videos:
            _note_video(video, findings)
        if same:
            findings.same_responses.append(item.row)
        _note_duplicate(item, rows_of, findings)
    lengths = Lengths(
        prompt=tuple(prompt_sizes) or fitting_sizes(findings.prompts or [1], 4),
        response=tuple(response_sizes) or fitting_sizes(findings.responses or [1], 2),
    )
    unit = "tokens" if processor is not None else "characters"
    return "\n".join(_report(path, findings, lengths, unit, cut))


def _limit(sizes: Sequence[int]) -> int:
    return sizes[-1] if sizes else UNLIMITED


def _measure(
    record: Record, processor: Processor | None, max_prompt: int, max_response: int
) -> tuple[int, list[int], bool]:
    """(length of the prompt, the longest one where responses have their own; lengths of the
    responses; whether responses of different ranks are all the same, as far as they are kept).

    Raises:
      UnusableRow: training could not use the row.
    """
    compared = record.ranked and len({response.rank for response in record.responses}) > 1
    if processor is not None:
        row = tokenize_contexts(record, processor, max_prompt, UNLIMITED)
        longest = max(len(context.prompt_ids) for _, context in all_contexts(row))
        lengths = [len(response.ids) for response in filled_responses(row)]
        if max(lengths, default=0) > max_response:
            row = tokenize_contexts(record, processor, max_prompt, max_response)
        return longest, lengths, compared and not differs(row)
    prompts = [record.prompt, *(r.prompt for r in record.responses if r.prompt is not None)]
    prompt = max(sum(len(turn.text) for turn in turns) for turns in prompts)
    if prompt > max_prompt:
        raise UnusableRow("prompt_too_long", f"{prompt} characters, the limit is {max_prompt}")
    lengths = [sum(len(turn.text) for turn in r.turns) for r in record.responses]
    contents = [(r.rank, (r.turns, r.prompt, r.images)) for r in record.responses]
    return prompt, lengths, compared and not differ(contents)


def _kind(record: Record) -> str:
    count = len(record.responses)
    if not count:
        return "prompts without responses"
    if record.ranked:
        return "pairs" if count == 2 else f"rankings of {count}"
    if any(response.desirable is not None for response in record.responses):
        return "responses with a verdict"
    return "single responses or dialogues" if count == 1 else f"{count} unranked responses"


def _pictures(record: Record) -> Iterator[ImageRef]:
    yield from record.images
    yield from record.other_images or ()
    for response in record.responses:
        yield from response.images or ()


def _note_video(video: VideoRef, findings: Findings) -> None:
    """Notes how large, long and fast a video is."""
    if video.file is None:
        size, count, rate = image_size(video.frames[0]), len(video.frames), video.fps
    else:
        facts = video_facts(video)
        size, count, rate = facts.size, len(shown_range(video)), facts.rate
    findings.frame_sizes[size[::-1]] += 1
    findings.frames.append(count)
    if rate is not None:
        findings.rates.append(rate)


def _note_duplicate(record: Record, rows_of: dict[str, int | None], findings: Findings) -> None:
    """Notes a row that says what an earlier one does."""
    shown = [image.fingerprint() for image in _pictures(record)]
    shown += [video.fingerprint() for video in record.videos]
    said = [(r.turns, r.prompt, r.rank, r.desirable) for r in record.responses]
    key = fingerprint_bytes(repr((shown, record.prompt, said)).encode())
    if key in rows_of:
        findings.duplicates.append((record.row, rows_of[key]))
    rows_of.setdefault(key, record.row)


def _report(path: str, findings: Findings, lengths: Lengths, unit: str, cut: int) -> Iterator[str]:
    usable = len(findings.prompts)
    yield f"{os.fspath(path)}: {usable + len(findings.dropped)} rows, {usable} can be used"
    for name, counts in (("formats", findings.notes.formats), ("usable rows", findings.kinds)):
        yield f"{name}: " + (", ".join(f"{n} {c}" for n, c in counts.most_common()) or "none")
    if findings.without_media:
        yield f"usable rows without an image or video: {findings.without_media}"
    yield from findings.notes.lines()
    yield from findings.notes.warnings()
    yield from findings.texts.lines()
    yield f"rows that would be dropped: {len(findings.dropped)}"
    for reason, count in Counter(row.reason for row in findings.dropped).most_common():
        yield f"  {reason}: {count}"
        examples = [row for row in findings.dropped if row.reason == reason][:_SHOWN]
        for skipped in examples:
            named = f" (id {skipped.id!r})" if skipped.id else ""
            yield f"    row {skipped.row}{named}: {skipped.detail}"
        yield from _more([row.row for row in findings.dropped if row.reason == reason], "    ")
    yield f"duplicate rows: {len(findings.duplicates)}"
    for row, earlier in findings.duplicates[:_SHOWN]:
        yield f"  row {row} says what row {earlier} does"
    yield from _more([row for row, _ in findings.duplicates], "  ")
    same = findings.same_responses
    yield f"left out where responses are compared, as these are the same: {len(same)}"
    if same:
        yield f"  same_responses: rows {', '.join(map(str, same[:_SHOWN]))}"
        yield from _more(same, "  ")
    yield from _histogram(f"prompts, {unit}", findings.prompts, lengths.prompt)
    yield from _histogram(f"responses, {unit}", findings.responses, lengths.response)
    if cut:
        yield f"  {cut} responses would lose their tail"
    yield from _image_sizes("images", findings.sizes)
    if findings.frames:
        yield from _image_sizes("videos", findings.frame_sizes)
        yield f"  frames: {min(findings.frames)} to {max(findings.frames)}"
        unknown = len(findings.frames) - len(findings.rates)
        known = [f"{min(findings.rates):g} to {max(findings.rates):g}"] if findings.rates else []
        known += [f"unknown of {unknown}"] if unknown else []
        yield f"  frames a second: {', '.join(known)}"


def _more(rows: Sequence[int | None], indent: str) -> Iterator[str]:
    """The numbers of rows that are not shown, the first of them."""
    left = rows[_SHOWN:]
    if left:
        named = ", ".join(map(str, left[:_NAMED]))
        yield f"{indent}and {len(left)} more: rows {named}{', ...' if left[_NAMED:] else ''}"


def _histogram(title: str, values: list[int], sizes: Sequence[int]) -> Iterator[str]:
    if not values:
        return
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    yield f"{title}: shortest {ordered[0]}, median {middle}, longest {ordered[-1]}; buckets:"
    counts = [sum(low < v <= high for v in values) for low, high in pairwise((-1, *sizes))]
    over = len(values) - sum(counts)
    rows = [*zip([f"≤ {size}" for size in sizes], counts, strict=True)]
    if over:
        rows.append((f"> {sizes[-1]}", over))
    for label, count in rows:
        bar = "#" * round(_BAR * count / max([*counts, over]))
        yield f"  {label:>8} {count:8d} {bar}".rstrip()


def _image_sizes(name: str, sizes: Counter[tuple[int, int]]) -> Iterator[str]:
    if not sizes:
        yield f"{name}: none"
        return
    smallest, largest = (pick(sizes, key=lambda s: s[0] * s[1]) for pick in (min, max))
    yield (
        f"{name}: {sizes.total()} of {len(sizes)} sizes, "
        f"{smallest[0]} x {smallest[1]} to {largest[0]} x {largest[1]}"
    )
    for (width, height), count in sizes.most_common(_SHOWN):
        yield f"  {width} x {height}: {count}"
