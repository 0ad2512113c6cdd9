"""`mmpo data check` says what is in a file, `mmpo data convert` what it wrote."""

import json
import struct
import zlib

import pytest
from PIL import Image

from mmpo_jax.cli import main
from mmpo_jax.commands.data_check import check_data
from mmpo_jax.data.images import image_size
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import ImageRef

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises much; what follows would decode to it, if one tried."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (height * (width + 1)), 1)
    image = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + image


def pair(prompt, chosen="a red star", rejected="two rings", **fields):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | fields


@pytest.fixture
def file(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 30)).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "huge.png").write_bytes(huge_png(10_000, 10_000))
    rows = [
        pair("a ring ?", id=1, image="a.png"),
        pair("a ring ?", id="1", image="b.png"),
        pair("a ring ?", image="a.png"),
        pair("a ring ?", chosen="yes", rejected="yes"),
        {"question": "a ring ?", "models_output": ["yes", "no", "a"], "final_ranking": [1, 2, 2]},
        {"question": "a ring ?", "models_output": ["yes", "no"], "final_ranking": [1]},
        {"question": "a ring ?", "models_output": ["yes", "no"], "ethical": [1, float("nan")]},
        pair("a ring ?", image="broken.png"),
        pair("a ring ?", image="huge.png"),
        pair("a ring ?", image="gone.png"),
        pair("is there a red star in the picture and a ring ?", image="b.png"),
        {"prompt": "a ring ?"},
        {"prompt": "a ring ?", "completion": "no", "label": False},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return str(path)


def test_columns_that_mean_nothing_and_rows_that_show_nothing(tmp_path):
    """So that a misspelt column does not pass for a prompt alone, or for a text without image."""
    row = {"prompt": "a ring ?", "Chosen": "yes", "Rejected": "no", "answer": "yes"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    report = check_data(str(path))
    assert "columns that mean nothing here: Chosen 1, Rejected 1\n" in report
    assert "usable rows without an image or video: 1\n" in report


def test_a_hundred_megapixels_are_not_decoded(file, tmp_path):
    image = ImageRef("huge", data=huge_png(9_400, 9_500))  # 89.3 million pixels
    assert image_size(image) == (9_500, 9_400)
    records, _ = read_records(file)
    (huge,) = [record for record in records if "huge" in repr(record.images)]
    assert huge.row == 9
    assert (
        "image_too_large: 1\n    row 9 (id 'row 9'): image "
        f"{tmp_path}/huge.png is too large to decode safely (10000 x 10000 pixels"
    ) in check_data(file)


def test_check(file, capsys):
    assert main(["data", "check", file]) == 0
    report = capsys.readouterr().out
    for line in (
        "rows.jsonl: 14 rows, 8 can be used",
        "formats: trl 10, mm_rlhf 3",
        "usable rows without an image or video: 4",
        "usable rows: pairs 5, rankings of 3 1, prompts without responses 1, "
        "responses with a verdict 1",
        "rows that would be dropped: 6",
        "rows that repeat an earlier row's id: 1; their ids here are 'ID (row N)'",
        "  rank_count: 1\n    row 6 ",
        "  bad_score: 1\n    row 7 ",
        "  image_broken: 1\n    row 8 ",
        "  image_missing: 1\n    row 10 ",
        "  bad_json: 1\n    row 14: Expecting property name enclosed",
        "duplicate rows: 1\n  row 3 says what row 1 does",
        "left out where responses are compared, as these are the same: 1\n  same_responses: rows 4",
        "prompts, characters: shortest 8, median 8, longest 47; buckets:\n      ≤ 16        7 ###",
        "      ≤ 48        1 #",
        "responses, characters: shortest 1, median 9, longest 10",
        "images: 4 of 2 sizes, 20 x 30 to 40 x 30\n  40 x 30: 2\n  20 x 30: 2",
    ):
        assert line in report


def test_rows_that_are_left_out_where_responses_are_compared(tmp_path, tiny_processor):
    """Those that training leaves out: a ranking only where no response is another one, a pair also
    where it differs behind the largest bucket."""

    def ranking(texts, ranks):
        return {"question": "a ring ?", "models_output": texts, "final_ranking": ranks}

    long = {side: "red " * 9 + word for side, word in (("chosen", "star"), ("rejected", "ring"))}
    rows = [
        pair("a ring ?"),
        pair("a ring ?", chosen="no", rejected="no"),
        pair("a ring ?", **long),
        ranking(["no", "no", "no"], [1, 2, 3]),
        ranking(["no", "no", "a ring"], [1, 2, 3]),
        ranking(["no", "no"], [1, 1]),
        {"prompt": "a ring ?", "completion": "no"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options, expected in (
        ({}, "2, 4"),
        ({"processor": tiny_processor}, "2, 4"),
        ({"processor": tiny_processor, "response_sizes": (9,)}, "2, 3, 4"),
        ({"processor": tiny_processor, "response_sizes": (10,)}, "2, 4"),
    ):
        report = check_data(str(path), **options)
        count = len(expected.split())
        assert f"as these are the same: {count}\n  same_responses: rows {expected}\n" in report
        assert "7 rows, 7 can be used" in report


def test_check_against_given_buckets(file):
    report = check_data(file, prompt_sizes=(8, 32), response_sizes=(2, 9))
    assert "prompt_too_long: 1\n    row 11 (id 'row 11'): 47 characters, the limit is 32" in report
    assert "≤ 8        7" in report
    assert "> 9        3" in report
    assert "3 responses would lose their tail" in report


def test_check_with_tokens(file, tiny_folder, capsys):
    arguments = ["--model", str(tiny_folder), "--prompt-sizes", "16,64", "--format", "trl"]
    assert main(["data", "check", file, *arguments]) == 0
    report = capsys.readouterr().out
    assert "formats: trl 13" in report
    assert "10 can be used" in report
    # <s> USER: a ring ? ASSISTANT: and, of the longest, twelve words and four of the image.
    assert "prompts, tokens: shortest 6, median 6, longest 19; buckets:" in report
    assert "≤ 64" in report
    assert "responses, tokens: shortest 2, " in report  # one word and EOS


def test_check_takes_the_images_and_prompts_that_training_takes(tmp_path, tiny_processor):
    def user(text):
        return {"role": "user", "content": text}

    def assistant(text):
        return {"role": "assistant", "content": text}

    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "b.png")
    row = {
        "messages": [user("<image>a ring ?"), assistant("no")],
        "images": ["a.png"],
    }
    rows = [
        row | {"rejected_response": "yes", "rejected_images": ["b.png"]},
        row | {"rejected_messages": [user("<image>a ring or a star ?"), assistant("yes yes yes")]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "2 can be used" in check_data(str(path))
    report = check_data(str(path), processor=tiny_processor)
    assert "2 can be used" in report
    # <s>, four of the image, USER: a ring ? ASSISTANT: and, in the second row's own, three more.
    assert "prompts, tokens: shortest 10, median 13, longest 13" in report
    assert "responses, tokens: shortest 2, median 2, longest 4" in report
    assert "own_prompt" not in check_data(str(path), processor=tiny_processor, prompt_sizes=(13,))
    assert "prompt_too_long: 1" in check_data(
        str(path), processor=tiny_processor, prompt_sizes=(12,)
    )


def test_check_of_nothing_usable(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n")
    assert main(["data", "check", str(path)]) == 0
    assert "1 rows, 0 can be used" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "gone.jsonl")]) == 1
    assert "gone.jsonl: No such file" in capsys.readouterr().err


def test_convert(file, tmp_path, capsys):
    out = tmp_path / "out" / "rows.parquet"
    assert main(["data", "convert", file, str(out)]) == 1
    message = "4 of 14 rows cannot be used, more than the allowed 10.0%"
    assert message in capsys.readouterr().err
    assert main(["data", "convert", file, str(out), "--max-skipped", "0.5"]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 10 rows" in said
    assert "rows.rejected_rows.jsonl: 4 rows that cannot be used" in said
    assert len(read_records(out)[0]) == 10
    target = str(tmp_path / "trl.jsonl")
    assert main(["data", "convert", str(out), target, "--format", "trl"]) == 1
    said = capsys.readouterr().err
    assert "row 5 (id 'row 5') as trl: responses: 3 responses; a row holds a chosen and a" in said
    drop = ["--drop", "rank,desirable", "--max-skipped", "0.3"]  # now that images are copied
    assert main(["data", "convert", str(out), target, "--format", "trl", *drop]) == 0
    assert "label" not in (tmp_path / "trl.jsonl").read_text()
