"""The files of a report: the same bytes again, never too large, and nothing in them but text."""

import base64
import gzip
import json
import re
from pathlib import Path

from helpers import buckets
from helpers.report_runs import EVIL, large_prompts, write_alignment, write_training

from mmpo_jax import cli
from mmpo_jax.alignment import align
from mmpo_jax.reporting import page
from mmpo_jax.reporting.page import render, write_report
from mmpo_jax.reporting.runs import read_runs


def data_of(html):
    packed = re.search(r'id="data">([^<]*)<', html)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def pictures_of(html):
    return re.search(r'id="pictures">([^<]*)<', html)[1].split()


def test_the_page_of_an_alignment(tmp_path):
    run = write_alignment(tmp_path / "run", prompts=5)
    told = write_report([str(run)], str(tmp_path / "report.html"))
    html = (tmp_path / "report.html").read_text()
    assert (told.files, told.prompts, told.size) == (
        [str(tmp_path / "report.html")],
        10,
        len(html.encode()),
    )
    assert "finished: 2 rounds" in html and "CHAIR_s" in html and "rewards/margins" in html
    assert {each["id"] for each in data_of(html)["prompts"]} == {f"p{i:04d}" for i in range(10)}
    assert len(pictures_of(html)) == 5  # both rounds have the same
    assert "://" not in html.replace("http://www.w3.org/2000/svg", "")
    again = write_report([str(run)], str(tmp_path / "again" / "report.html"))
    assert (tmp_path / "again" / "report.html").read_text() == html and again.size == told.size


def test_nothing_of_a_run_is_markup(tmp_path):
    run = write_alignment(tmp_path / "run", prompts=3, texts=[EVIL])
    recipe = json.loads((run / "recipe.json").read_text()) | {"model": EVIL}
    (run / "recipe.json").write_text(json.dumps(recipe))
    tax = json.loads((run / "tax.json").read_text()) | {"warnings": [EVIL], "result": EVIL}
    (run / "tax.json").write_text(json.dumps(tax))
    write_report([str(run)], str(tmp_path / "report.html"))
    html = (tmp_path / "report.html").read_text()
    assert "<img" not in html and html.count("<script") == 3
    assert data_of(html)["prompts"][0]["seen"][0]["r"][0][2] == EVIL


def test_more_prompts_go_to_further_files(tmp_path, monkeypatch):
    run = write_alignment(tmp_path / "run", prompts=40)
    write_report([str(run)], str(tmp_path / "whole.html"))
    whole = data_of((tmp_path / "whole.html").read_text())["prompts"]
    empty = write_report([str(run)], str(tmp_path / "empty.html"), prompts=0).size
    monkeypatch.setattr(page, "MAX_BYTES", empty + 20_000)
    told = write_report([str(run)], str(tmp_path / "report #1.html"))
    assert len(told.files) > 2
    texts = [Path(file).read_text() for file in told.files]
    assert all(len(text.encode()) <= page.MAX_BYTES for text in texts)
    found = [prompt for text in texts for prompt in data_of(text)["prompts"]]
    assert [prompt["id"] for prompt in found] == [prompt["id"] for prompt in whole]
    links = [f'href="./report%20%231-{n}.html#prompts"' for n in range(2, len(texts) + 1)]
    assert all(link in texts[0] for link in links)
    monkeypatch.undo()
    told = write_report([str(run)], str(tmp_path / "report #1.html"))
    assert sorted(path.name for path in tmp_path.glob("report*")) == ["report #1.html"]


def test_a_thousand_prompts_have_at_most_20_mb(tmp_path):
    runs = read_runs([str(write_alignment(tmp_path / "run", prompts=1, rounds=1))])
    ((name, data),) = render(runs, large_prompts(1000), 1000, "report.html")
    assert name == "report.html" and len(data_of(data.decode())["prompts"]) == 1000
    assert 10_000_000 < len(data) <= 20_000_000


def test_several_runs_side_by_side(tmp_path):
    folders = [str(write_alignment(tmp_path / f"seed{s}", 3, seed=s)) for s in range(3)]
    folders += [str(write_training(tmp_path / "train", finished=False))]
    write_report(folders, str(tmp_path / "report.html"))
    html = (tmp_path / "report.html").read_text()
    assert "(3 seeds)" in html and "not finished: 300 updates done" in html
    assert [name for name, _ in data_of(html)["runs"]] == ["seed0", "seed1", "seed2", "train"]


def test_the_command(tmp_path, capsys):
    run = write_alignment(tmp_path / "run", prompts=5)
    other = write_training(tmp_path / "other")
    assert cli.main(["report", str(run), "--prompts", "4"]) == 0
    assert f"report: {run}/report.html (0." in capsys.readouterr().out
    html = (run / "report.html").read_text()
    assert len(data_of(html)["prompts"]) == 4 and "6 more are left out" in html
    assert cli.main(["report", str(run), str(other)]) == 1
    assert "--output: give the file" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--output", "a.txt"]) == 1
    assert "ends with .html" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "is no run" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--prompts", "some"]) == 1
    assert "give a number, or all" in capsys.readouterr().err


def test_gains_and_losses(tmp_path):
    run = write_alignment(tmp_path / "run", prompts=2)
    rows = json.loads((run / "rounds.json").read_text())
    rows[1] |= {"dpo_accuracy": 0.4, "dpo_margin": -0.02, "dpo_updates": 10}
    (run / "rounds.json").write_text(json.dumps(rows))
    write_report([str(run)], str(tmp_path / "report.html"))
    html = (tmp_path / "report.html").read_text()
    assert "round 1: DPO prefers the rejected responses" in html
    assert "round 2: recall fell" in html and "round 2 (result)" in html
    cell = '<td>0.160 [0.140, 0.180]<span class="delta better">−0.320, p 0.003 ✓</span></td>'
    assert cell in html


def test_runs_and_pages_in_buckets(tmp_path, monkeypatch):
    buckets.file_bucket(monkeypatch, tmp_path / "buckets")
    run = write_alignment(tmp_path / "buckets" / "bucket" / "run", prompts=3, questions=2)
    told = write_report(["gs://bucket/run"], "gs://bucket/run/report.html")
    assert told.files == ["gs://bucket/run/report.html"]
    there = (run / "report.html").read_bytes()
    write_report([str(run)], str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_bytes() == there


def test_a_page_that_cannot_be_written_fails_no_run(tmp_path, caplog):
    align.write_page(str(tmp_path))  # which is no run
    assert "the report cannot be written" in caplog.text and "is no run" in caplog.text
