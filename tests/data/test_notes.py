"""What reading a file says of it, beside its records."""

import pytest
from helpers.format_rows import ALL_SIX, RLAIF_V, read_one, write_jsonl

from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.readers import read_records

SAMPLES = {"prompt": "?", "responses": ["a", "b"]}


def lines(folder, *rows):
    notes = Notes()
    read_records(write_jsonl(folder / "rows.jsonl", rows), notes=notes)
    return list(notes.lines())


UNREAD = "rows whose response_ids are not read: 1; the texts are tokenized"
MEANS_NOTHING = "columns that mean nothing here: response_ids 1"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (SAMPLES | {"response_ids": [[1]]}, [UNREAD]),
        (SAMPLES | {"response_ids": [[1], [2], [3]]}, [UNREAD]),
        (SAMPLES | {"response_ids": "x"}, [MEANS_NOTHING]),
        ({"prompt": "?", "completion": "a", "response_ids": [[1, 2]]}, [UNREAD]),
        ({"prompt": "?", "chosen": "a", "rejected": "b", "response_ids": [[1], [2]]}, [UNREAD]),
        ({"prompt": "?", "response_ids": [[1]]}, [MEANS_NOTHING]),
        (
            SAMPLES | {"chosen": "a", "rejected": "b", "finished": [True, False]},
            ["columns that mean nothing here: responses 1, finished 1"],
        ),
    ],
)
def test_ids_that_are_not_read_are_told(folder, row, told):
    assert lines(folder, row, SAMPLES, SAMPLES | {"response_ids": [[1], [2]]}) == told
    ids = {response.token_ids for response in read_one(folder, row).responses}
    assert ids <= {None}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"prompt": "?", "chosen": "a", "rejected": "b", "label": True}, ["label"]),
        (
            {"prompt": "?", "chosen": "a", "rejected": "b", "completion": "c", "label": True},
            ["completion", "label"],
        ),
        (SAMPLES | {"label": True}, ["label"]),
        ({"prompt": "?", "completion": "a", "label": True}, []),
    ],
)
def test_columns_of_trl_beside_which_others_are_read(folder, row, unread):
    told = [f"columns that mean nothing here: {', '.join(f'{name} 1' for name in unread)}"]
    assert lines(folder, row) == (told if unread else [])


def test_log_probs_of_rlaif_v_mean_something(folder):
    row = RLAIF_V[0] | {"image": "a.png", "logps": ALL_SIX}
    assert not any("logps" in line for line in lines(folder, row))
    (line,) = lines(folder, {"prompt": "?", "chosen": "a", "rejected": "b", "logps": ALL_SIX})
    assert line == "columns that mean nothing here: logps 1"


def test_an_id_among_the_other_columns_of_a_record(folder):
    """Is none of the row, and no repeated one."""
    row = {"id": "1", "prompt": [], "responses": [], "extra": {"id": "z", "x": 1}}
    row |= {"prompt": [{"role": "user", "content": "?"}]}
    record = read_one(folder, row)
    assert (record.id, record.own_id, dict(record.extra)) == ("1", None, {"id": "z", "x": 1})
    assert lines(folder, row) == ["columns that mean nothing here: id 1, x 1"]
    source = folder / "rows.jsonl"
    convert_data(str(source), str(folder / "out.jsonl"))
    (after,), _ = read_records(folder / "out.jsonl")
    assert after.id == "1"
    with pytest.raises(MmpoError, match="extra: id: the column means something else here"):
        convert_data(str(source), str(folder / "trl.jsonl"), format="trl")
