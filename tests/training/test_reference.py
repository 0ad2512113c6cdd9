"""The reference cache: used while nothing changed, made again whenever something did."""

import dataclasses
import shutil

import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.checkpoints.fingerprints import fingerprint_model
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.core.files import read_table
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.scoring import log_probs as reference
from mmpo_jax.scoring import stage
from mmpo_jax.scoring.log_probs import score_records
from mmpo_jax.training.reference import reference_stage

LENGTHS = Lengths(prompt=(12, 24), response=(4, 8))


def make_records(count=3, scene=0, prompt="a ring ?", chosen="a red star"):
    return [
        Record(
            id=f"row-{number}",
            images=(ImageRef(f"{number}", png_bytes(sample_scene("train", scene, number), 24)),),
            prompt=(Turn("user", prompt),),
            responses=(Response.of(chosen), Response.of("a green ring and two blue rings")),
        )
        for number in range(count)
    ]


class Cache:
    """One folder of a reference cache, asked with one thing or another changed."""

    def __init__(self, folder, checkpoint, mesh, monkeypatch):
        self.folder, self.checkpoint, self.mesh = folder, checkpoint, mesh
        self.calls = 0
        score = reference.compute_scores

        def count(*args):
            self.calls += 1
            return score(*args)

        monkeypatch.setattr(reference, "compute_scores", count)

    def ask(self, checkpoint=None, batch_size=4, lengths=LENGTHS, compute_dtype="float32", **rows):
        checkpoint = checkpoint or self.checkpoint
        model, params = load_model(checkpoint)
        processor = Processor(checkpoint, load_config(checkpoint))
        tokenized, _ = tokenize_records(make_records(**rows), processor, LENGTHS)
        return reference_stage(
            Checkpoint(model, processor, params, fingerprint_model(checkpoint)),
            tokenized,
            lengths,
            self.mesh,
            folder=str(self.folder),
            batch_size=batch_size,
            compute_dtype=compute_dtype,
        )

    def ran(self, **changes):
        """Whether the model ran."""
        before = self.calls
        self.ask(**changes)
        return self.calls > before


@pytest.fixture
def cache(tmp_path, tiny_folder, mesh, monkeypatch):
    cache = Cache(tmp_path / "run", tiny_folder, mesh, monkeypatch)
    cache.ask()
    return cache


def same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == np.float32
        assert ours[name].tobytes() == theirs[name].tobytes()


def test_a_hit_does_not_run_the_model(cache, monkeypatch):
    assert cache.calls == 1
    first = cache.ask()
    monkeypatch.setattr(reference, "compute_scores", None)
    same(cache.ask(), first)
    same(cache.ask(batch_size=2), first)  # how it is cut does not change what it is


def test_another_compute_dtype(cache):
    assert cache.ran(compute_dtype="bfloat16")
    assert not cache.ran(compute_dtype="bfloat16")


def test_values_are_the_models(cache, tiny_model, tiny_processor, mesh):
    tokenized, _ = tokenize_records(make_records(), tiny_processor, LENGTHS)
    expected = score_records(
        Checkpoint(tiny_model[0], tiny_processor, tiny_model[1]), tokenized, LENGTHS, mesh, 1
    )
    for (name, ours), row, theirs in zip(cache.ask().items(), tokenized, expected, strict=True):
        assert name == row.id
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    table = read_table(cache.folder / "reference.parquet").to_pydict()
    assert table["num_tokens"] == [[4, 8]] * 3  # EOS included


@pytest.mark.parametrize(
    "change",
    [
        {"chosen": "a blue star"},
        {"prompt": "a star ?"},
        {"scene": 1},
        {"count": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_rows(cache, change):
    assert cache.ran(**change)
    assert not cache.ran(**change)


def test_another_model(cache, tmp_path):
    other = tiny.make_folder(tmp_path / "other", seed=1)
    first = cache.ask()
    assert cache.ran(checkpoint=other)
    assert not np.allclose(cache.ask(checkpoint=other)["row-0"], first["row-0"])
    assert cache.ran()  # the first one's was overwritten


@pytest.mark.parametrize("file", ["chat_template.jinja", "preprocessor_config.json"])
def test_another_template_or_image_preprocessing(cache, tiny_folder, tmp_path, file):
    """Same weights and, for the image processor, the same tokens."""
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    text = (other / file).read_text()
    changed = {
        "chat_template.jinja": text.replace("{{- ' <image>' -}}", "{{- ' <image> ,' -}}"),
        "preprocessor_config.json": text.replace("0.48145466", "0.5"),
    }[file]
    assert changed != text
    (other / file).write_text(changed)
    assert cache.ran(checkpoint=other)


def test_a_damaged_cache_is_made_again(cache):
    first = cache.ask()
    path = cache.folder / "reference.parquet"
    path.write_bytes(path.read_bytes()[:-7])
    calls = cache.calls
    same(cache.ask(), first)
    assert cache.calls == calls + 1


@pytest.mark.slow
def test_rows_in_any_order_and_of_any_shape(tiny_model, tiny_processor, mesh):
    """A row's score depends neither on its neighbours nor on its place."""
    records = [
        dataclasses.replace(record, id=f"{prompt}-{record.id}")
        for prompt in ("a ring ?", "is there a red star in the picture and a ring ?")
        for record in make_records(prompt=prompt)
    ]
    records[1] = dataclasses.replace(records[1], responses=records[1].responses[:1])
    tokenized, skipped = tokenize_records(records, tiny_processor, LENGTHS)
    assert not skipped

    def score(rows, batch_size):
        start = Checkpoint(tiny_model[0], tiny_processor, tiny_model[1])
        sums = score_records(start, rows, LENGTHS, mesh, batch_size)
        return {row.id: values for row, values in zip(rows, sums, strict=True)}

    forward, backward = score(tokenized, 4), score(tokenized[::-1], 2)
    assert [len(values) for values in forward.values()] == [2, 1, 2, 2, 2, 2]
    for name, values in forward.items():
        np.testing.assert_allclose(values, backward[name], rtol=1e-4)


def test_parts(cache, monkeypatch):
    """What is cut into parts is put together again."""
    first = cache.ask()
    monkeypatch.setattr(stage, "ROWS_PER_PART", 2)
    (cache.folder / "reference.parquet").unlink()
    calls = cache.calls
    parts = cache.ask()
    assert cache.calls == calls + 2
    assert list(parts) == list(first)
    for name in first:
        np.testing.assert_allclose(parts[name], first[name], rtol=1e-4)
