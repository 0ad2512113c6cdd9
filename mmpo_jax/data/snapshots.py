"""The data files of a folder: those of one split, wherever in it they lie."""

import logging
import posixpath
import re
from collections.abc import Callable, Collection

from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import walk

log = logging.getLogger(__name__)

NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` and the hub write beside data."""
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Names that stand for splits -> the split."""
_UNSAID = "train"
"""The split of files that say none, where others do."""
_SHARD = re.compile(r"(?P<split>\w[\w.]*?)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.")
"""Names that `datasets` gives the files of a split."""


def split_path(path: epath.PathLike) -> tuple[epath.Path, str | None]:
    """(folder or file, split or None) of ``PATH#SPLIT``; a name that has a # itself is no split."""
    whole = epath.Path(path)
    name, mark, split = str(path).rpartition("#")
    if not mark or whole.exists():
        return whole, None
    return epath.Path(name), split


def data_files(
    folder: epath.Path, split: str | None, kind_of: Callable[[str], str | None]
) -> list[epath.Path]:
    """The files of a folder's split in the order of their paths; hidden ones do not count.

    Args:
      split: None for the only one, for ``train``, or for the only one that begins so. Files that
        say none are ``train``.
      kind_of: the kind of data that a file of a name holds; None where it is no data file.

    Raises:
      DataError: there are none, of several kinds, or of several splits and none can be chosen.
    """
    kinds: dict[str, list[str]] = {}
    for place, folders, files in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(part.startswith(".") for part in place.split("/")):
            continue
        for name in files:
            kind = kind_of(name)
            if kind is not None and not name.startswith((".", "_")) and name not in NOT_DATA:
                kinds.setdefault(kind, []).append(posixpath.join(place, name))
    if len(kinds) != 1:
        found = ", ".join(sorted(kinds)) or "none"
        raise DataError(f"{folder}: data files of one kind are wanted, found: {found}")
    (names,) = kinds.values()
    said = {name: split_of(name) for name in sorted(names)}
    silent = sum(one is None for one in said.values())
    splits: dict[str, list[str]] = {}
    for name, one in said.items():
        splits.setdefault(one or _UNSAID, []).append(name)
    if split is None and len(splits) == 1:
        return [folder / name for name in said]
    if 0 < silent < len(said):
        log.info("%s: %d files that say no split count as %s", folder, silent, _UNSAID)
    if silent == len(said):
        if _SPLITS.get(split or "") != _UNSAID:
            raise DataError(f"{folder} has files without splits; leave the split {split} out")
        return [folder / name for name in said]
    return [folder / name for name in splits[choose_split(folder, splits.keys(), split)]]


def split_of(name: str) -> str | None:
    """The split that a file of a path belongs to by that; None where it does not say."""
    *folders, file = name.split("/")
    shard = _SHARD.match(file)
    if shard is not None:
        word = shard["split"]
        return _SPLITS.get(word.lower(), word)
    words = [re.split(r"[._-]|\d", file.lower())[0], *(f.lower() for f in reversed(folders))]
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def choose_split(folder: epath.Path, splits: Collection[str | None], split: str | None) -> str:
    """The split that is asked for, else ``train``, else the only one that begins so; the log says
    which.

    Raises:
      DataError: naming the splits and how one is chosen.
    """
    names = sorted(name for name in splits if name is not None)
    wanted = split if split is None else _SPLITS.get(split, split)
    if wanted is None:
        trains = [name for name in names if name.startswith("train")]
        wanted = "train" if "train" in names else trains[0] if len(trains) == 1 else None
        if wanted is not None and len(names) > 1:
            others = ", ".join(name for name in names if name != wanted)
            log.info("%s: reading the split %s and not %s", folder, wanted, others)
    if wanted not in names:
        if not names:
            raise DataError(f"{folder} has no folder of a split")
        asked = f"; there is no {split}" if split is not None else ""
        found = f"has the splits {', '.join(names)}{asked}"
        raise DataError(f"{folder} {found}; give one as {folder}#{names[0]}")
    assert wanted is not None
    return wanted
