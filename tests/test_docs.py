"""What the documentation says is there."""

import ast
import re
from pathlib import Path

import pytest

from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.formats.writing import STRIP
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.readers import iter_records
from mmpo_jax.data.records import Record
from mmpo_jax.models.families import FAMILIES
from mmpo_jax.rewards import REWARDS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_test_that_is_named_exists(page):
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        body = ast.parse((ROOT / file).read_text()).body
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        assert not name or name in defined, f"{file}::{name}"


def families_table():
    """model_type -> cells by column."""
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    header = rows[0]
    assert header[0] == "`model_type`"
    cells = [row for row in rows if len(row) == len(header) and row[0].strip("`") in FAMILIES]
    return {row[0].strip("`"): dict(zip(header, row, strict=True)) for row in cells}


def test_every_family_is_in_the_table():
    table = families_table()
    assert list(table) and table.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        says = {column: cell == "yes" for column, cell in table[name].items()}
        assert says["images"] == says["several images"] == (family.images is not None)
        assert says["video"] == (family.videos is not None)
        assert "tests/parity/" in list(table[name].values())[-1]


def test_every_reward_is_in_the_table():
    page = (ROOT / "docs" / "training.md").read_text()
    table = page.partition("| reward |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in row.split("|")[1].split(",")]
    assert {name.strip(" `") for name in named} == REWARDS.keys()


def test_every_format_has_an_example_row_that_is_read(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text()
    sections = re.findall(r"^### `(\w+)`\n.*?^```json\n(.*?)^```$", page, re.M | re.S)
    assert {name for name, _ in sections} == FORMATS.keys()
    for file in ("cat.jpg", "dog.jpg", "other.jpg", "scene.png", "short/cat.png", "clip_7/1.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"not decoded")
    for name, rows in sections:
        (tmp_path / "rows.jsonl").write_text(rows)
        found = Notes()
        items = list(iter_records(tmp_path / "rows.jsonl", notes=found))
        assert found.formats == {name: len(items)}
        assert all(isinstance(item, Record) for item in items), items
    assert all(f"`{field}`" in page for field in STRIP)
