"""Which records have images and videos that open."""

import dataclasses
from collections.abc import Iterable

from mmpo_jax.core import progress
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.core.processes import check_same, in_shares
from mmpo_jax.data.images import image_problem, image_size
from mmpo_jax.data.records import ImageRef, Record, VideoRef
from mmpo_jax.data.skipped import Problem, SkippedRow
from mmpo_jax.data.videos import cut_problem, video_facts, video_problem


def check_images(
    records: Iterable[Record], file: str = ""
) -> tuple[list[Record], list[SkippedRow]]:
    """Decode all images and frames once; separate the records with one that does not open.

    The frames of a video have to be of one size. Of several processes each opens its share.

    Raises:
      MmpoError: another process has other records.
    """
    good: list[Record] = []
    skipped: list[SkippedRow] = []
    given = list(records)
    check_same(
        f"{file}: the data", lambda: fingerprint_json([[each.row, each.id] for each in given])
    )
    with progress.doing("checking images", len(given)) as activity:

        def check(record: Record) -> Problem | None:
            problem = media_problem(record)
            activity.advance()
            return problem

        problems = in_shares(check, given)
    for record, problem in zip(given, problems, strict=True):
        if problem is None:
            good.append(record)
        else:
            skipped.append(SkippedRow(file, record.row, record.id, *problem))
    return good, skipped


def media_problem(record: Record) -> Problem | None:
    """Why an image or a video of a record cannot be used; None where all can."""
    frames = [frame for video in record.videos for frame in video.frames]
    own = [image for response in record.responses for image in response.images or ()]
    for image in (*record.images, *(record.other_images or ()), *own, *frames):
        problem = image_problem(image)
        if problem is not None:
            return problem
    for video in record.videos:
        if video.file is None:
            continue
        problem = video_problem(video.file) or cut_problem(video)
        if problem is not None:
            return problem
    uneven = next(filter(None, map(_uneven, record.videos)), None)
    return None if uneven is None else ("bad_video_entry", uneven)


def with_known_images(record: Record) -> Record:
    """A record whose images open, with their digests and sizes beside them."""
    if not (record.images or record.videos or any(r.images for r in record.responses)):
        return record
    others = record.other_images
    return dataclasses.replace(
        record,
        images=_known(record.images),
        other_images=None if others is None else _known(others),
        videos=tuple(map(_known_video, record.videos)),
        responses=tuple(
            dataclasses.replace(response, images=_known(response.images))
            if response.images
            else response
            for response in record.responses
        ),
    )


def _known(images: Iterable[ImageRef]) -> tuple[ImageRef, ...]:
    return tuple(
        dataclasses.replace(
            image,
            digest=dataclasses.replace(image, edit=None).fingerprint(),
            size=image_size(image),
        )
        for image in images
    )


def _known_video(video: VideoRef) -> VideoRef:
    if video.file is None:
        return video.with_parts(_known(video.frames))
    digest = dataclasses.replace(video.file, edit=None).fingerprint()
    file = dataclasses.replace(video.file, digest=digest)
    return dataclasses.replace(video, file=file, facts=video_facts(video))


def _uneven(video: VideoRef) -> str | None:
    """What is wrong with the sizes of a video's frames, or None."""
    sizes = {image_size(frame) for frame in video.frames}
    return f"{video.name} has frames of sizes {sorted(sizes)}" if len(sizes) > 1 else None
