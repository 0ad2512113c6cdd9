"""COCO's 80 classes: their names in texts, and which of them an image holds.

Rohrbach et al. 2018 (arXiv 1809.02156): an image holds what has a mask in it and what one of its
reference captions names. A table of synonyms, a line a class, says by which words.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from mmpo_jax.benchmarks.benchmark import Files, share
from mmpo_jax.benchmarks.english import English
from mmpo_jax.benchmarks.tables import as_id
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import read_bytes
from mmpo_jax.core.progress import counted, doing

COCO_SOURCE = "images.cocodataset.org/annotations/annotations_trainval2014.zip"
SPLITS = ("train", "val")

ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "animal", "cub"),
)
QUALIFIED = {
    **{f"{age} {animal}": animal for animal in ANIMALS for age in ("baby", "adult")},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}
"""Pairs of words of which the first names nobody, and what they stand for."""

NO_CLASS = ("home plate", "train track")
"""Pairs whose words are none of the classes that they are alone."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words that name classes."""

    classes: Mapping[str, str]
    """Word, or several -> class."""
    pairs: Mapping[str, str]
    """Two words that are one -> what they are read as."""

    @classmethod
    def of(cls, classes: Mapping[str, str], doubles: Iterable[str]) -> Vocabulary:
        """With doubles of two words that are read as they are, besides those that all have."""
        return cls(classes, {double: double for double in (*doubles, *NO_CLASS)} | QUALIFIED)

    def joined(self, words: Sequence[str]) -> list[str]:
        """The words, with pairs as one, from left to right."""
        return [word or single for single, word in self._walk(words)]

    def pairs_of(self, words: Sequence[str]) -> list[str]:
        """The pairs among the words alone."""
        return [word for _, word in self._walk(words) if word is not None]

    def _walk(self, words: Sequence[str]) -> Iterable[tuple[str, str | None]]:
        """(a word, None) or (the first of a pair, what the pair is read as)."""
        place = 0
        while place < len(words):
            pair = self.pairs.get(" ".join(words[place : place + 2]))
            yield words[place], pair
            place += 1 if pair is None else 2

    def named(self, words: Sequence[str]) -> list[tuple[str, str]]:
        """(word, its class) for those that name one; a toilet's seat is no chair."""
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [(word, self.classes[word]) for word in words if word in self.classes]


@dataclasses.dataclass(frozen=True)
class Mentions:
    """The classes that one caption mentions."""

    image: int
    caption: str
    named: Sequence[tuple[str, str]]
    """(word, class) of every mention that counts."""
    held: frozenset[str]
    """Classes that are in the image."""

    @property
    def invented(self) -> list[tuple[str, str]]:
        return [(word, name) for word, name in self.named if name not in self.held]

    @property
    def right(self) -> frozenset[str]:
        return frozenset(name for _, name in self.named) & self.held

    def told(self) -> dict[str, Any]:
        """What became of the caption, as JSON."""
        return {
            "id": self.image,
            "caption": self.caption,
            "mentioned": [list(pair) for pair in self.named],
            "invented": [list(pair) for pair in self.invented],
            "in_the_image": sorted(self.held),
        }


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over captions."""

    captions: int
    with_objects: int
    """Captions that mention any class."""
    with_inventions: int
    mentions: int
    inventions: int
    right: int
    """Classes that are mentioned and there, once a caption."""
    held: int
    """Classes that are there, once a caption."""

    @classmethod
    def of(cls, captions: Sequence[Mentions]) -> Totals:
        return cls(
            len(captions),
            sum(bool(one.named) for one in captions),
            sum(bool(one.invented) for one in captions),
            sum(len(one.named) for one in captions),
            sum(len(one.invented) for one in captions),
            sum(len(one.right) for one in captions),
            sum(len(one.held) for one in captions),
        )

    @property
    def of_all(self) -> float:
        """The share of captions that invent something."""
        return share(self.with_inventions, self.captions)

    @property
    def of_those_with_objects(self) -> float:
        """The same, of captions that mention any class."""
        return share(self.with_inventions, self.with_objects)

    @property
    def of_mentions(self) -> float:
        return share(self.inventions, self.mentions)

    @property
    def recall(self) -> float:
        return share(self.right, self.held)


def beside_of(totals: Totals, mentions: Sequence[Mentions]) -> dict[str, float]:
    """What numbers of captions hide."""
    return {
        "CHAIRs_of_captions_with_objects": totals.of_those_with_objects,
        "recall": totals.recall,
        "words_per_caption": share(
            sum(len(one.caption.split()) for one in mentions), len(mentions)
        ),
        "captions": totals.captions,
        "captions_without_objects": totals.captions - totals.with_objects,
        "images": len({one.image for one in mentions}),
        "mentions": totals.mentions,
        "inventions": totals.inventions,
    }


def read_classes(path: epath.Path, stripped: bool) -> dict[str, str]:
    """Word -> class, of a table of synonyms: a line a class, which is its first word.

    Args:
      path: the table.
      stripped: without the blanks around words; with them, a word is never found in a text.

    Raises:
      MmpoError: the file is missing or is no text.
    """
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise MmpoError(f"{path}: is no text: {error}") from error
    classes: dict[str, str] = {}
    for line in filter(str.strip, lines):
        words = line.strip().split(", ")
        words = [word.strip() for word in words] if stripped else words
        classes |= dict.fromkeys(words, words[0])
    return classes


def held_by(
    images: Iterable[int],
    folder: epath.Path,
    vocabulary: Vocabulary,
    words_of: Callable[[str], Sequence[str]],
) -> dict[int, frozenset[str]]:
    """The classes that images hold, by masks and reference captions of COCO 2014.

    Args:
      images: their ids.
      folder: of COCO's annotations, or the folder above it.
      vocabulary: what names classes.
      words_of: the words of a caption, in the form that the vocabulary has.

    Raises:
      MmpoError: a file is missing, and where to get it, or an image is in none of them.
    """
    held: dict[int, set[str]] = {image: set() for image in images}
    known: set[int] = set()
    for kind, path in annotation_files(folder):
        content = read_annotations(path)
        names = {one["id"]: one["name"] for one in content.get("categories", ())}
        known |= {one["id"] for one in content.get("images", ())} & held.keys()
        for one in counted(content["annotations"], f"reading {path.name}", "annotations"):
            image = one["image_id"]
            if image not in held:
                continue
            known.add(image)
            if kind == "captions":
                named = vocabulary.named(words_of(one["caption"]))
                held[image] |= {name for _, name in named}
                continue
            name = names[one["category_id"]]
            if name not in vocabulary.classes:
                raise MmpoError(f"{path}: the class {name!r} is not in the table of synonyms")
            held[image].add(vocabulary.classes[name])
    missing = held.keys() - known
    if missing:
        raise MmpoError(
            f"{folder}: the image {min(missing)} and {len(missing) - 1} others are in none of "
            "COCO's files of 2014"
        )
    return {image: frozenset(names) for image, names in held.items()}


def annotation_files(folder: epath.Path) -> list[tuple[str, epath.Path]]:
    """(instances or captions, file) of both splits.

    Raises:
      MmpoError: one is missing; where to get it.
    """
    return [
        (kind, published_file(folder, f"{kind}_{split}2014.json"))
        for kind in ("instances", "captions")
        for split in SPLITS
    ]


def check_can_score(files: Files, *tables: str) -> None:
    """Checks that what scores captions is there, which asking a model may take hours before.

    Args:
      files: of a benchmark.
      tables: names of the table of synonyms.

    Raises:
      MmpoError: something is missing, and where to get it.
    """
    first_file(files, *tables)
    annotation_files(files.folder)
    English().check()


def first_file(files: Files, *names: str) -> epath.Path:
    """The first of some names that is in a benchmark's folder.

    Raises:
      MmpoError: none is; where to get it.
    """
    for name in names:
        if (files.folder / name).exists():
            return files.folder / name
    raise MmpoError(f"{files.folder}: has no {names[0]}; it is part of {files.source}")


def published_file(folder: epath.Path, name: str) -> epath.Path:
    """A file of COCO's annotations.

    Raises:
      MmpoError: it is not there; where to get it.
    """
    for below in ("", "annotations", "coco/annotations", "coco2014/annotations"):
        if (folder / below / name).exists():
            return folder / below / name
    raise MmpoError(f"{folder}: has no {name}; it is part of {COCO_SOURCE}")


def read_annotations(path: epath.Path) -> dict[str, Any]:
    """A file of COCO's annotations.

    Raises:
      MmpoError: it is none.
    """
    with doing(f"reading {path.name}"):
        try:
            content = json.loads(read_bytes(path))
        except ValueError as error:
            raise MmpoError(f"{path}: is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise MmpoError(f"{path}: has no list of `annotations`")
    return content


def image_number(value: Any, where: str) -> int:
    """COCO's number of an image, of an id or a file's name: COCO_val2014_000000000139.jpg.

    Raises:
      MmpoError: there is none in it.
    """
    stem = as_id(value).rsplit("/", 1)[-1].split(".")[0]
    digits = stem.rsplit("_", 1)[-1]
    if not digits.isdecimal():
        raise MmpoError(f"{where}: {value!r:.80} is no image of COCO")
    return int(digits)
