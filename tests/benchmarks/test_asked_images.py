"""What models are asked by judged benchmarks: questions with images, by their links or in rows."""

import base64
import json

import pytest
from helpers.benchmarks import write

from mmpo_jax.benchmarks.benchmark import Files, find_benchmark
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene

PNG = png_bytes(sample_scene("test", 0, 0), 24)


@pytest.fixture
def asked(tmp_path):
    """What a benchmark asks by the rows of a file: (what, the first record, its image)."""

    def asked(name, file, row):
        if file.endswith(".json"):
            (tmp_path / file).write_text(json.dumps([row]))
        else:
            write(tmp_path / file, [row])
        benchmark = find_benchmark(name)
        assert benchmark.asks is not None
        (found,) = benchmark.asks(Files(tmp_path, benchmark.source))
        (record,) = found.records
        assert record.prompt[-1].text == "What is it?" and found.temperature == 0
        assert record.images[0].read() == PNG
        return found, record

    return asked


MMHAL = {"image_id": "abc", "image_src": "https://far/x/77_o.png?d=1", "question": "What is it?"}


@pytest.mark.parametrize("name", ["77_o.png", "images/77_o.png", "abc.jpg", "images/abc.png"])
def test_mmhal(asked, tmp_path, name):
    (tmp_path / "images").mkdir()
    with pytest.raises(MmpoError, match=r"has no 77_o.png, which is to be downloaded from https"):
        asked("mmhal", "response_template.json", MMHAL)
    (tmp_path / name).write_bytes(PNG)
    found, record = asked("mmhal", "response_template.json", MMHAL)
    assert record.id == "abc" and found.max_new_tokens == 1024


def test_images_in_rows(asked):
    asked("mmhal", "response_template.json", {**MMHAL, "image": base64.b64encode(PNG).decode()})


def test_llava_bench(asked, tmp_path):
    (tmp_path / "a.jpg").write_bytes(PNG)
    row = {"question_id": 7, "image": "a.jpg", "text": "What is it?", "category": "conv"}
    _, record = asked("llava_bench", "qa90_questions.jsonl", row)
    assert record.id == "7"


def test_refomb(asked, tmp_path):
    (tmp_path / "a.jpg").write_bytes(PNG)
    row = {"id": 0, "image_url": "https://far/a.jpg", "question": "What is it?"}
    _, record = asked("refomb", "RefoMB_dev.jsonl", row)
    assert record.id == "0"


def test_safetybench_asks_set_by_set(asked):
    row = {"id": 4, "question": "What is it?", "image": base64.b64encode(PNG).decode()}
    found, record = asked("mm_rlhf_safetybench", "vlguard_unsafes.jsonl", row)
    assert (found.name, record.id, found.max_new_tokens) == ("unsafes", "4", 2048)
