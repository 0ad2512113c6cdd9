"""Every usable row is kept, under an id of its own that depends on no later row."""

import itertools

import pytest
from helpers.format_rows import QUESTION, read_jsonl, write_jsonl

from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.data.ids import RowIds, own_id
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.readers import read_records

PAIR = {"prompt": QUESTION, "chosen": "A cat.", "rejected": "A dog."}


def ids_of(folder, *rows):
    path = write_jsonl(folder / "rows.jsonl", [row | PAIR for row in rows])
    records, skipped = read_records(path)
    assert skipped == []
    return [record.id for record in records]


def test_pairs_of_one_prompt_are_no_duplicates(tmp_path):
    rows = [{"id": 5}, {"id": "2"}, {"id": "5"}, {"id": "2"}, {"id": "3"}]
    assert ids_of(tmp_path, *rows) == ["5", "2", "5 (row 3)", "2 (row 4)", "3"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"id": "2"}, {}], ["2", "row 2"]),
        ([{}, {"id": 1}], ["row 1", "1"]),
        ([{"id": "row 2"}, {}], ["row 2", "row 2 (row 2)"]),
        ([{}, {"id": "row 1"}], ["row 1", "row 1 (row 2)"]),
        ([{"id": "7"}, {"id": "7"}, {"id": "7 (row 2)"}], ["7", "7 (row 2)", "7 (row 2) (row 3)"]),
        ([{"id": "7 (row 2)"}, {"id": "7"}, {"id": "7"}], ["7 (row 2)", "7", "7 (row 3)"]),
        ([{"id": "7 (row 3)"}, {"id": "7"}, {"id": "7"}], ["7 (row 3)", "7", "7 (row 3) (row 3)"]),
        ([{"id": 7.0}, {"id": float("nan")}, {"id": ""}], ["7", "row 2", "row 3"]),
        ([{"idx": 7}, {"id": "", "idx": 8}], ["7", "8"]),
    ],
)
def test_written_and_given_names_never_meet(tmp_path, rows, expected):
    assert ids_of(tmp_path, *rows) == expected


def test_names_are_unique_whatever_people_write():
    alphabet = [None, "a", "row 2", "row 3", "a (row 2)", "a (row 3)", "a (row 3) (row 4)"]
    for owns in itertools.product(alphabet, repeat=4):
        ids = RowIds()
        names = [ids.name(own, number) for number, own in enumerate(owns, start=1)]
        assert len(set(names)) == len(names)
        for own, name in zip(owns, names, strict=True):  # and the row's own can be found in it
            assert own is None or name.startswith(own)


def test_a_row_that_is_left_out_keeps_its_name(tmp_path):
    """Or ids would change once the file is mended."""
    rows = [PAIR | {"id": "7", "chosen": ""}, PAIR | {"id": "7"}]
    records, skipped = read_records(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [record.id for record in records] == ["7 (row 2)"]
    assert [row.id for row in skipped] == ["7"]


@pytest.mark.parametrize("format", ["record", "trl", "llama_factory", "ms_swift", "mm_rlhf_pairs"])
def test_converted_rows_have_their_own_ids(tmp_path, format):
    rows = [PAIR | {"id": "7"}, PAIR | {"id": "7", "rejected": "A cow."}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    convert_data(str(source), str(tmp_path / "out.jsonl"), format=format)
    assert [row["id"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["7", "7"]
    notes = Notes()
    records, _ = read_records(tmp_path / "out.jsonl", notes=notes)
    assert [record.id for record in records] == ["7", "7 (row 2)"]
    assert (notes.repeated_ids, notes.ignored) == (1, {})


def test_own_ids():
    assert own_id({"id": 2**70, "idx": 3}) == str(2**70)
    assert own_id({}) is None
