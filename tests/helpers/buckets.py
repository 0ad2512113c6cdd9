"""gs:// without a network."""

import io
import sys
import types

from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from orbax.checkpoint._src.path import gcs_utils


class Bucket(MemoryFileSystem):
    """What is written to gs:// stays in memory."""

    protocol = "gs"
    cachable = False
    store: dict = {}  # noqa: RUF012 (what fsspec's class calls it)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            return super()._open(path, mode, **options)
        return io.BytesIO(self.cat_file(path))  # a reader of its own


def empty_bucket(monkeypatch) -> Bucket:
    """What gs:// is for the rest of a test."""
    system = Bucket()
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda *_: system)
    return system


class FileBucket(DirFileSystem):
    """What is written to gs:// lies in a folder, where Orbax can write too."""

    protocol = "gs"
    cachable = False


def file_bucket(monkeypatch, root) -> None:
    """Makes gs://NAME/... the folder ROOT/NAME/... for the rest of a test, also for Orbax, which
    writes there as it does to buckets: a file in a step says that it is whole."""
    system = FileBucket(path=str(root), fs=LocalFileSystem(auto_mkdir=True))
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda *_: system)

    def kvstore(path):
        return {"driver": "file", "path": f"{root}/{path.removeprefix('gs://')}"}

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: None)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", types.ModuleType("storage"))
    for package in ("google", "google.cloud"):
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
