"""Paths by URL that cannot be followed."""

import json
import sys

import pytest

from mmpo_jax import cli


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://host/a", "nothing is read or written by https://; download it and give its path"),
        ("https://huggingface.co/org/name", "a model of the hub is called org/name"),
        ("file:///a", "nothing is read or written by file://; give the path alone"),
        ("s3://bucket/a", "s3:// needs the package s3fs, which is not installed"),
    ],
)
def test_urls(tmp_path, monkeypatch, capsys, url, told):
    """As model, data or output of every command: one line."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "?", "chosen": "yes", "rejected": "no"}))
    out = tmp_path / "out.jsonl"
    model = "builtin:picture_world"
    for arguments in (
        ("score", "--model", url, "--data", rows, "--output", out),
        ("score", "--model", model, "--data", f"{url}.jsonl", "--output", out),
        ("generate", "--model", model, "--data", rows, "--output", f"{url}.jsonl"),
        ("score", "--model", model, "--data", rows, "--output", out, f"data.image_root={url}"),
        ("data", "check", f"{url}.jsonl"),
        ("data", "convert", rows, f"{url}.jsonl"),
        ("convert", url, tmp_path / "new"),
        ("convert", model, url),
    ):
        assert cli.main([str(argument) for argument in arguments]) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and url in message, message
        assert told in message or "hub" in told or "is in a bucket" in message, message
