"""Rows that once went wrong, through `mmpo score`: ids and log-probs are transformers'."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")
from helpers import failed_rows
from helpers import row_cases as rows
from helpers.their_rows import ids_of, is_learned, once, their_cuts, their_sum

from mmpo_jax import cli

pytestmark = pytest.mark.parity

CASES = [(folder, name) for folder, cases in failed_rows.FOLDERS.items() for name in cases]


@pytest.fixture(scope="module")
def scored(kind_case, picture_folder):
    """name of a kind -> what `mmpo score` writes of all its rows, by folder and name."""
    made: dict[str, dict[tuple[str, str], Any]] = {}

    def scored(kind):
        if kind not in made:
            cases = {
                (folder, name): failed_rows.FOLDERS[folder][name][1]
                for folder, name in CASES
                if failed_rows.FOLDERS[folder][name][0] == kind
            }
            written = [json.dumps({"id": " ".join(key), **case.row}) for key, case in cases.items()]
            data, out = picture_folder / "rows.jsonl", picture_folder / "scores.jsonl"
            data.write_text("\n".join(written))
            model = kind_case(kind)[1].folder
            flags = ["--model", str(model), "--data", str(data), "--output", str(out)]
            assert cli.main(["score", *flags, "--tokens", failed_rows.LIMITS]) == 0
            scores = map(json.loads, out.read_text().splitlines())
            made[kind] = dict(zip(cases, scores, strict=True))
        return made[kind]

    return scored


@pytest.mark.parametrize(("folder", "name"), CASES)
@pytest.mark.slow
def test_ids_and_log_probs(folder, name, scored, kind_case, picture_folder):
    name_of_kind, case = failed_rows.FOLDERS[folder][name]
    kind, checkpoint, tokenizer = kind_case(name_of_kind)
    found = scored(name_of_kind)[folder, name]
    prompt = found["prompt_ids"]
    for place, response in enumerate(case.responses):
        texts = their_cuts(kind, tokenizer, case, response)
        if not case.row.get("finished", [True] * (place + 1))[place]:
            texts[-1] = texts[-1].removesuffix(kind.eos)
        cuts = [ids_of(kind, tokenizer, text) for text in texts]
        ids = found["response_ids"][place]
        assert once(kind, tokenizer, prompt) == cuts[0]
        assert once(kind, tokenizer, [*prompt, *ids]) == cuts[-1]
        learned = is_learned(response, [len(cut) - len(cuts[0]) for cut in cuts])
        assert found["num_tokens"][place] == learned.sum()
        parts = [part for said in (*case.prompt, *response) for part in said["content"]]
        shown = [picture_folder / f"{number}.png" for number in range(parts.count(rows.IMAGE))]
        expected = their_sum(kind, checkpoint, prompt, ids, learned, shown)
        assert found["logps"][place] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert len(found["logps"]) == len(case.responses)
