"""Which records have images and videos that open."""

import os
from collections.abc import Iterable

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.progress import counted
from mmpo_jax.data.images import ImageTooLarge, image_size, open_image
from mmpo_jax.data.records import ImageRef, Record, VideoRef
from mmpo_jax.data.skipped import Problem, SkippedRow


def check_images(
    records: Iterable[Record], file: str = ""
) -> tuple[list[Record], list[SkippedRow]]:
    """Decode all images and frames once; separate the records with one that does not open.

    The frames of a video have to be of one size.
    """
    good: list[Record] = []
    skipped: list[SkippedRow] = []
    seen: dict[str, Problem | None] = {}
    for record in counted(records, "checking images"):
        problem = media_problem(record, seen)
        if problem is None:
            good.append(record)
        else:
            skipped.append(SkippedRow(file, record.row, record.id, *problem))
    return good, skipped


def media_problem(record: Record, seen: dict[str, Problem | None]) -> Problem | None:
    """Why an image or a video of a record cannot be used; None where all can.

    Args:
      seen: what is known of files, by path; it grows.
    """
    frames = [frame for video in record.videos for frame in video.frames]
    own = [image for response in record.responses for image in response.images or ()]
    for image in (*record.images, *(record.other_images or ()), *own, *frames):
        problem = _image_problem(image, seen)
        if problem is not None:
            return problem
    uneven = next(filter(None, map(_uneven, record.videos)), None)
    return None if uneven is None else ("bad_video_entry", uneven)


def _image_problem(image: ImageRef, seen: dict[str, Problem | None]) -> Problem | None:
    """Why an image does not open, or None; a file that many rows share is opened once."""
    key = None if image.path is None else os.fspath(image.path)
    if key is not None and key in seen:
        return seen[key]
    problem: Problem | None = None
    try:
        open_image(image)
    except ImageTooLarge as error:
        problem = "image_too_large", str(error)
    except DataError as error:
        problem = "image_broken", str(error)
    if key is not None:
        seen[key] = problem
    return problem


def _uneven(video: VideoRef) -> str | None:
    """What is wrong with the sizes of a video's frames, or None."""
    sizes = {image_size(frame) for frame in video.frames}
    return f"{video.name} has frames of sizes {sorted(sizes)}" if len(sizes) > 1 else None
