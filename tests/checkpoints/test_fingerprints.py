"""Which files a checkpoint's fingerprint is of."""

import dataclasses
import os
import shutil

import pytest

from mmpo_jax.checkpoints import locations
from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.fingerprints import fingerprint_model, fingerprint_step, has_fingerprint
from mmpo_jax.checkpoints.locations import fingerprint_location, locate
from mmpo_jax.checkpoints.peft import save_adapter
from mmpo_jax.commands.convert import convert
from mmpo_jax.core import files, processes
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.models.lora import Lora, add_adapters


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def run(tiny_folder, tmp_path):
    """An Orbax run whose step also has an optimizer."""
    convert(str(tiny_folder), str(tmp_path / "run"))
    return tmp_path / "run"


def change(path):
    """One byte of a file is another."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fingerprint(name):
    return fingerprint_location(locate(str(name)))


def test_what_a_model_is_made_of(folder):
    first = fingerprint_model(folder)
    assert load_start(str(folder)).fingerprint == fingerprint(folder) == first
    for name in ("config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"):
        kept = (folder / name).read_bytes()
        change(folder / name)
        assert fingerprint_model(folder) != first, name
        (folder / name).write_bytes(kept)
    assert has_fingerprint(folder, first)
    (folder / "chat_template.jinja").unlink()
    assert not has_fingerprint(folder, first)
    (folder / "model.safetensors").unlink()
    assert not has_fingerprint(folder, first)


def test_nothing_else_is_read(folder, monkeypatch):
    """Of a trainer's folder neither the optimizer nor earlier checkpoints."""
    first = fingerprint_model(folder)
    (folder / "checkpoint-10").mkdir()
    for name in ("optimizer.pt", "README.md", "other.safetensors", "checkpoint-10/optimizer.pt"):
        (folder / name).write_bytes(b"much")
    read = []
    real = files.fingerprint_file
    monkeypatch.setattr(
        files, "fingerprint_file", lambda path: read.append(os.path.basename(path)) or real(path)
    )
    assert fingerprint_model(folder) == first
    assert "config.json" in read
    assert not {"optimizer.pt", "README.md", "other.safetensors"} & set(read)


def test_what_a_step_of_a_run_is_made_of(run):
    first = fingerprint(run)
    step = run / "checkpoints" / "0"
    assert load_start(str(run)).fingerprint == fingerprint(step) == first
    (step / "optimizer").mkdir()
    (step / "optimizer" / "moments").write_bytes(b"much")
    (run / "metrics.jsonl").write_bytes(b"{}")
    assert fingerprint(run) == first
    for name in ("config.json", "tokenizer.json"):
        kept = (run / "base" / name).read_bytes()
        change(run / "base" / name)
        assert fingerprint(run) != first, name
        (run / "base" / name).write_bytes(kept)
    before = fingerprint_step(str(step), str(run / "base"))
    change(max((step / "params").rglob("d/*"), key=lambda path: path.stat().st_size))
    assert fingerprint_step(str(step), str(run / "base")) != before  # Orbax may not read it now


def test_an_adapter_counts_with_its_base(folder, tiny_model, tmp_path):
    model, params = tiny_model
    params = add_adapters(params, model, Lora(rank=2), (), 0)
    adapter = tmp_path / "adapter"
    save_adapter(adapter, model, params, base=str(folder), dropout=0.0)
    first = fingerprint(adapter)
    assert load_start(str(adapter)).fingerprint == first != fingerprint(folder)
    (adapter / "optimizer.pt").write_bytes(b"much")
    assert fingerprint(adapter) == first
    change(folder / "tokenizer_config.json")
    assert fingerprint(adapter) != first
    first = fingerprint(adapter)
    change(adapter / "adapter_model.safetensors")
    assert fingerprint(adapter) != first


def test_another_process_waits_for_what_the_first_sees(run, folder, monkeypatch):
    """Of a run the same step, and never a repository of the hub in a folder's place."""
    first = locate(str(run))
    monkeypatch.setattr(locations, "is_first", lambda: False)
    monkeypatch.setattr(locations, "on_one", lambda function: (False, first))
    monkeypatch.setattr(processes, "POLLING", 0)
    assert locate(str(run)) == first
    looks = iter([str(folder), "no/where", str(run)])
    locate_here = locations._locate
    monkeypatch.setattr(locations, "_locate", lambda name: locate_here(next(looks)))
    assert locate(str(run)) == first
    monkeypatch.setattr(processes, "PATIENCE", 0.0)
    with pytest.raises(MmpoError, match=r"no/where: .*: the first process sees it, this one does"):
        locate("no/where")
    other = dataclasses.replace(first, weights=first.weights + "1")
    monkeypatch.setattr(locations, "on_one", lambda function: (False, other))
    monkeypatch.setattr(locations, "_locate", locate_here)
    with pytest.raises(MmpoError, match="the first process sees it"):
        locate(str(run))
