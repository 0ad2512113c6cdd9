"""What tests of data share."""

import pytest
from helpers.format_rows import png


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "short/c.png", "video/clip/f2.png", "video/clip/f10.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png("red" if name == "a.png" else "blue"))
    return tmp_path
