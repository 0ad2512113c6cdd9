"""gs:// without a network."""

import io

from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


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
