"""The stage of tokenised rows: the same rows as are read at once, kept, and said again."""

import dataclasses
import json
import logging
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.pictures import IMAGES

from mmpo_jax.core import known_files, workers
from mmpo_jax.core.files import read_json
from mmpo_jax.data import row_parts, row_stage
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.contexts import all_contexts
from mmpo_jax.data.image_states import Seen, changed
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import ImageRef
from mmpo_jax.data.row_stage import tokenized_rows
from mmpo_jax.data.sources import LearnedFile, with_scores
from mmpo_jax.data.tokenized_rows import (
    ContextRows,
    ListedRows,
    concatenated,
    fingerprint_records,
    prefixed,
)
from mmpo_jax.data.usable import usable_records
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.recipes.training import CachedReference
from mmpo_jax.training.examples import make_examples
from mmpo_jax.training.mismatched import with_mismatched
from mmpo_jax.training.row_use import LearnedUse

LENGTHS = Lengths(prompt=(32,), response=(12,))
SAID = {"prompt": "is there a star ?", "chosen": "yes", "rejected": "no"}
NAMES = ("photograph", "odd-size", "grey")


def use(*names: str, **options) -> LearnedUse:
    return LearnedUse.of([make_term(name, **options) for name in names], CachedReference())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With images, and a cache of its own."""
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_files, "_recent", type(known_files._recent)())
    monkeypatch.setattr(row_stage, "PART_ROWS", 2)
    for name in NAMES:
        write_image(tmp_path / f"{name}.png", name)
    return tmp_path


def write_image(path, name):
    path.write_bytes(IMAGES[name])
    settle(path)


def settle(path):
    """As if it had been there for long."""
    os.utime(path, ns=(10**18, 10**18))


ROWS = [
    {"id": "a", "images": ["photograph.png"], **SAID},
    {"id": "a", "images": ["odd-size.png"], **SAID, "score": [2, 1]},
    {"id": "gone", "images": ["gone.png"], **SAID},
    {"id": "broken", "images": ["broken.png"], **SAID},
    {"id": "same", **SAID, "chosen": "no"},
    {"id": "long", **SAID, "prompt": "a star " * 40},
    {"id": "cut", **SAID, "chosen": "a star " * 20, "Unknown": 1},
    {"id": "typed", **SAID, "chosen": "</s> a star"},
    {"id": "blind", **SAID},
]


def write_rows(folder, rows=ROWS, kind="jsonl") -> LearnedFile:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    (folder / "broken.png").write_bytes(b"no image")
    settle(path)
    settle(folder / "broken.png")
    return LearnedFile(path=str(path), max_skipped=0.9)


def make(folder, data, processor, wanted=None, workers=1, name="rows"):
    return tokenized_rows(
        data,
        wanted or use("dpo"),
        processor,
        LENGTHS,
        folder=str(folder / "out"),
        name=name,
        skipped_file=str(folder / "skipped.jsonl"),
        workers=workers,
    )


def at_once(folder, data, processor, wanted=None):
    wanted = wanted or use("dpo")
    record_set = data.load(supervised=True, messages_as=wanted.messages_as)
    record_set = with_scores(record_set, data)
    skipped = str(folder / "at-once.jsonl")
    _, records = usable_records(
        record_set, processor, LENGTHS, skipped, wanted.unfit, wanted.tokenize
    )
    return ListedRows([wanted.select(record) for record in records])


def assert_same(stored, listed, processor, needs=("rank",)):
    """All that training reads of two sequences is the same."""
    assert fingerprint_records(stored) == fingerprint_records(listed)
    assert stored.prompts == listed.prompts
    for field in dataclasses.fields(listed.sizes):
        ours, theirs = getattr(stored.sizes, field.name), getattr(listed.sizes, field.name)
        assert list(ours) == list(theirs)
    contexts = [context.id for record in listed for _, context in all_contexts(record)]
    assert ContextRows(stored).ids == contexts
    assert [context.id for context in ContextRows(stored)] == contexts
    examples, expected = make_examples(stored, needs), make_examples(listed, needs)
    for one, other in zip(examples, expected, strict=True):
        assert one.id == other.id
        assert one.fields.keys() == other.fields.keys()
        for name in one.fields:
            np.testing.assert_array_equal(one.fields[name], other.fields[name])
        for row, row_at_once in zip(one.rows, other.rows, strict=True):
            assert row.id == row_at_once.id
            assert (row.left_out, row.ranked) == (row_at_once.left_out, row_at_once.ranked)
            batches = [
                pad_batch([x], processor, rows=1, prompt_sizes=(32,), response_sizes=(12,))
                for x in (row, row_at_once)
            ]
            for ours, theirs in zip(*(vars(batch).values() for batch in batches), strict=True):
                np.testing.assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_rows_that_are_read_at_once(folder, tiny_processor, kind):
    rows = ROWS
    if kind == "parquet":
        held = [{"bytes": IMAGES[name], "path": None} for name in NAMES]
        rows = [{**row, "images": [image]} for row, image in zip(ROWS[:3], held, strict=True)]
        rows = [{**row, "score": [2.0, 1.0]} for row in rows]
    data = write_rows(folder, rows, kind)
    stored = make(folder, data, tiny_processor)
    assert_same(stored, at_once(folder, data, tiny_processor), tiny_processor)
    assert (folder / "skipped.jsonl").exists() == (folder / "at-once.jsonl").exists()
    if kind == "jsonl":
        assert (folder / "skipped.jsonl").read_text() == (folder / "at-once.jsonl").read_text()
        assert stored.ids == ["a", "a (row 2)", "cut", "typed", "blind"]
    else:
        assert all(image.data is None for record in stored for image in record.images)


@pytest.mark.parametrize(
    ("rows", "objectives", "needs"),
    [
        (
            [
                {
                    "id": "own",
                    "responses": [
                        {
                            "turns": [{"role": "assistant", "content": text}],
                            "images": [f"{name}.png"],
                            "rank": rank,
                        }
                        for rank, (text, name) in enumerate(
                            zip(("a", "no"), NAMES, strict=False), 1
                        )
                    ],
                    "prompt": [{"role": "user", "content": "is there a star ?"}],
                },
                {"id": "b", "images": ["grey.png"], **SAID},
            ],
            ["dpo"],
            ("rank",),
        ),
        ([{"images": ["grey.png"], **SAID}] * 3, ["mdpo"], ("rank", "other_image")),
        (
            [{"prompt": "a ?", "completion": "a star", "label": n % 2 == 0} for n in range(3)],
            ["kto"],
            ("desirable",),
        ),
        (
            [
                {
                    "prompt": [{"role": "user", "content": "a ?"}],
                    "responses": [
                        {
                            "turns": [{"role": "assistant", "content": text}],
                            "rank": rank,
                            "scores": {"score": 3 - rank},
                            "spans": [{"start": 2, "end": 6, "weight": 5.0, "phrase": 0}],
                        }
                        for rank, text in enumerate(("a star", "a ring"), 1)
                    ],
                }
            ],
            ["dpo"],
            ("rank", "score", "token_weights", "phrases", "win_rate", "changed"),
        ),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "a star ?"},
                        {"role": "assistant", "content": "yes"},
                        {"role": "user", "content": "a ring ?"},
                        {"role": "assistant", "content": "no"},
                    ]
                }
            ],
            ["sft"],
            ("turn",),
        ),
    ],
    ids=["own images", "other image", "verdicts", "spans", "dialogues"],
)
def test_all_that_training_reads(folder, tiny_processor, rows, objectives, needs):
    data, wanted = write_rows(folder, rows), use(*objectives)
    stored = make(folder, data, tiny_processor, wanted)
    assert len(stored) == len(rows)
    assert_same(stored, at_once(folder, data, tiny_processor, wanted), tiny_processor, needs)


def test_pairs_are_joined_as_at_once(folder, tiny_processor, caplog):
    caplog.set_level(logging.INFO)
    rows = [
        {"prompt": "a ?", "chosen": "yes", "rejected": "no"},
        {"prompt": "a ?", "chosen": "no", "rejected": "a star"},
        {"prompt": "a ring ?", "chosen": "yes", "rejected": "no"},
    ]
    data = write_rows(folder, rows).model_copy(update={"join_pairs": True})
    for _ in range(2):
        caplog.clear()
        stored = make(folder, data, tiny_processor)
        assert caplog.text.count("2 rows of 1 prompts joined into rankings") == 1
        assert [len(record.responses) for record in stored] == [3, 2]
    assert_same(stored, at_once(folder, data, tiny_processor), tiny_processor)


def test_joined_rows_with_a_score_and_a_picture_that_comes_later(folder, tiny_processor):
    """What was missing may have been in any ranking: all is joined again."""
    responses = [
        {
            "turns": [{"role": "assistant", "content": text}],
            "rank": rank,
            "scores": {"a": 3 - rank, "b": 1},
        }
        for rank, text in ((1, "yes"), (2, "no"))
    ]
    prompt = [{"role": "user", "content": "is there a star ?"}]
    rows = [
        {"prompt": prompt, "responses": responses, "images": [image]}
        for image in ("gone.png", "grey.png", "photograph.png", "odd-size.png")
    ]
    data = write_rows(folder, rows).model_copy(update={"join_pairs": True, "score": "a"})
    for count in (3, 4):
        stored = make(folder, data, tiny_processor)
        assert len(stored) == count
        assert_same(
            stored, at_once(folder, data, tiny_processor), tiny_processor, ("rank", "score")
        )
        write_image(folder / "gone.png", "grey")


def test_selections_of_rows(folder, tiny_processor):
    data = write_rows(folder)
    stored, listed = make(folder, data, tiny_processor), at_once(folder, data, tiny_processor)
    places = np.array([3, 0, 4])
    assert_same(stored.take(places), listed.take(places), tiny_processor)
    both = [prefixed(rows, "1/") for rows in (stored[::-1], listed[::-1])]
    assert both[0].ids == [f"1/{id_}" for id_ in stored.ids[::-1]]
    joined = [
        concatenated([rows, other]) for rows, other in zip((stored, listed), both, strict=True)
    ]
    assert_same(*joined, tiny_processor)
    mixed = [with_mismatched(rows) for rows in (stored, listed)]
    assert_same(*mixed, tiny_processor, ("rank", "mismatched"))
    assert_same(
        mixed[0], ListedRows(list(mixed[0].rows)) and with_mismatched(listed), tiny_processor
    )
    for place in (len(stored), -len(stored) - 1):
        with pytest.raises(IndexError):
            stored[place]


def files_of(folder):
    (parts,) = (folder / "out").glob("rows.parts-*")
    return {path.name: path.read_bytes() for path in sorted(parts.iterdir())}


def test_processes_change_nothing(folder, tiny_processor, monkeypatch):
    data = write_rows(folder)
    make(folder, data, tiny_processor)
    alone, manifest = files_of(folder), read_json(folder / "out/rows.json")
    assert len(alone) == 5
    monkeypatch.setattr(row_stage, "ALONE", 1)
    begun = []
    popen = workers.subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda *a, **k: begun.append(popen(*a, **k)) or begun[-1]
    )
    for path in (folder / "out").glob("*/*"):
        path.unlink()
    (folder / "out/rows.json").unlink()
    make(folder, data, tiny_processor, workers=2)
    assert len(begun) == 2
    assert all(process.poll() is not None for process in begun)
    assert files_of(folder) == alone
    assert read_json(folder / "out/rows.json") == manifest


@pytest.fixture
def reads(monkeypatch):
    """Names of the images that are read, and numbers of parts that are made."""
    found = []
    read, make_bytes = ImageRef.read, row_parts._part_bytes
    monkeypatch.setattr(ImageRef, "read", lambda self: found.append(self.name) or read(self))
    monkeypatch.setattr(row_parts, "_part_bytes", lambda *a: found.append("part") or make_bytes(*a))
    return found


def test_a_second_run_reads_nothing_and_says_the_same(folder, tiny_processor, reads, caplog):
    caplog.set_level(logging.INFO)
    data = write_rows(folder)
    first = make(folder, data, tiny_processor)
    said, skipped = caplog.messages, (folder / "skipped.jsonl").read_bytes()
    assert "rows that repeat an earlier row's id: 1" in caplog.text
    assert "columns that mean nothing here: score 1, Unknown 1" in caplog.text
    assert "rows whose texts type control tokens: </s> 1" in caplog.text
    assert "3 of 5 rows have no image or video" in caplog.text
    assert "1 responses were cut to 12 tokens" in caplog.text
    assert [name for name in reads if name != "part"] == [
        "photograph.png",
        "odd-size.png",
        "broken.png",
    ]
    reads.clear()
    caplog.clear()
    (folder / "skipped.jsonl").unlink()
    known_files.flush()
    known_files._recent.clear()
    again = make(folder, data, tiny_processor)
    assert reads == []
    assert caplog.messages == said
    assert (folder / "skipped.jsonl").read_bytes() == skipped
    assert fingerprint_records(again) == fingerprint_records(first)


def test_a_kill_loses_the_part_that_was_made(folder, tiny_processor, reads):
    data = write_rows(folder)
    make(folder, data, tiny_processor)
    whole = files_of(folder)
    (folder / "out/rows.json").unlink()
    (parts,) = (folder / "out").glob("rows.parts-*")
    (parts / "00001.arrow").unlink()
    reads.clear()
    make(folder, data, tiny_processor)
    assert reads == ["part"]
    assert files_of(folder) == whole


def test_damage_is_mended(folder, tiny_processor, reads, caplog):
    data = write_rows(folder)
    make(folder, data, tiny_processor)
    whole = files_of(folder)
    (parts,) = (folder / "out").glob("rows.parts-*")
    (parts / "00001.arrow").write_bytes(b"")
    reads.clear()
    make(folder, data, tiny_processor)
    assert reads == ["part"]
    assert "00001.arrow is not what its manifest says" in caplog.text
    assert files_of(folder) == whole


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (lambda folder: os.utime(folder / "photograph.png"), 0),
        (lambda folder: write_image(folder / "photograph.png", "grey"), 1),
        (lambda folder: (folder / "photograph.png").unlink(), 1),
        (lambda folder: write_image(folder / "gone.png", "grey"), 1),
        (lambda folder: write_image(folder / "broken.png", "grey"), 1),
        (lambda folder: write_rows(folder, ROWS[1:]), 4),
    ],
    ids=["touched", "another", "removed", "there now", "mended", "other rows"],
)
def test_what_changes_is_read_again(folder, tiny_processor, reads, change, made):
    data = write_rows(folder)
    make(folder, data, tiny_processor)
    change(folder)
    reads.clear()
    stored = make(folder, data, tiny_processor)
    assert reads.count("part") == made
    assert_same(stored, at_once(folder, data, tiny_processor), tiny_processor)
    assert len(list((folder / "out").glob("rows.parts-*"))) == 1


def test_other_lengths_and_objectives_are_other_rows(folder, tiny_processor, reads):
    data = write_rows(folder)
    make(folder, data, tiny_processor)
    for wanted in (use("dpo"), use("sft")):
        reads.clear()
        make(folder, data, tiny_processor, wanted)
        assert ("part" in reads) == (wanted != use("dpo"))


def test_frames_in_a_folder_are_looked_at_again(folder, tiny_processor, reads):
    (folder / "clip").mkdir()
    write_image(folder / "clip/0.png", "grey")
    data = write_rows(folder, [{"videos": ["clip"], **SAID}, SAID])
    for added, made in ((None, 1), (None, 0), ("clip/1.png", 1), ("clip/notes.txt", 0)):
        if added is not None:
            write_image(folder / added, "grey")
        reads.clear()
        make(folder, data, tiny_processor)
        assert reads.count("part") == made


def test_what_was_looked_for_everywhere_is_looked_for_again(tmp_path):
    found = {"images": {}, "missed": [], "folders": {}}
    seen = [Seen.from_json({**found, "searched": searched}) for searched in (True, False)]
    assert changed(seen, lambda: None) == [0]
