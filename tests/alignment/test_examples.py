"""What a person reads of a round."""

import json
import math
from types import SimpleNamespace

import pyarrow as pa

from mmpo_jax.alignment.examples import PROMPTS, write_examples
from mmpo_jax.alignment.round import pairs_left_out
from mmpo_jax.data.records import ImageRef, Record, Turn
from mmpo_jax.recipes.align_recipe import AlignRecipe, Pairing

IMAGE = (ImageRef("dog.jpg", data=b""),)


def tables(count):
    ids = [f"p{number}" for number in range(count) for _ in range(2)]
    said = [("a dog", 0.9, 0.1), ("a cat", 0.2, 0.7)]
    claims = {"verdicts": [{"claim": c, "p_yes": yes, "p_no": no} for c, yes, no in said]}
    details = [json.dumps(claims), json.dumps({"reply": "what was this"})] * count
    generated = pa.table({"text": ["a dog and a cat", "word " * 40] * count})
    judged = pa.table(
        {
            "prompt_id": ids,
            "sample": [0, 1] * count,
            "score": [-1.0, math.nan] * count,
            "reason": [None, "no_json"] * count,
            "details": details,
        }
    )
    pairs = pa.table({"prompt_id": ["p0"], "chosen_sample": [0], "rejected_sample": [1]})
    return generated, judged, pairs


def test_responses_claims_and_verdicts(tmp_path):
    records = [Record("p0", IMAGE, (Turn("user", "What is there?"),), ())]
    write_examples(str(tmp_path), records, *tables(1), {"p0": {"pairs": 1}})
    lines = (tmp_path / "examples.txt").read_text().splitlines()
    assert lines[:6] == [
        "== p0 (dog.jpg)",
        "What is there?",
        "-- 0: score -1",
        "   a dog and a cat",
        "   + a dog (yes 0.900, no 0.100)",
        "   - a cat (yes 0.200, no 0.700)",
    ]
    assert lines[6] == "-- 1: no score: no_json"
    assert lines[-2:] == ["   reply: what was this", "pairs: 0 over 1"]
    assert max(map(len, lines)) <= 100


def test_details_of_a_users_own_are_no_claims(tmp_path):
    generated, judged, pairs = tables(1)
    details = [json.dumps({"p_yes": 0.7, "claims": "many"}), "{}"]
    judged = judged.set_column(4, "details", pa.array(details))
    records = [Record("p0", (), (Turn("user", "?"),), ())]
    write_examples(str(tmp_path), records, generated, judged, pairs, {"p0": {}})
    lines = (tmp_path / "examples.txt").read_text().splitlines()
    assert {"   p_yes: 0.7", "   claims: many"} < set(lines)


def test_the_first_prompts_alone(tmp_path):
    records = [
        Record(f"p{number}", IMAGE, (Turn("user", "?"),), ()) for number in range(PROMPTS + 3)
    ]
    counts = {"pairs_all": 6, "pairs_small_difference": 3, "pairs_same_text": 0, "pairs": 3}
    left_out = {record.id: counts for record in records} | {"p1": {"pairs_all": 0}}
    write_examples(str(tmp_path), records, *tables(PROMPTS + 3), left_out)
    text = (tmp_path / "examples.txt").read_text()
    assert text.count("== p") == PROMPTS
    assert text.count("pairs: none (left out: 3 by min_difference, 3 by length)") == PROMPTS - 2
    assert text.count("pairs: none (fewer than two responses have a score)") == 1


def test_what_length_leaves_out_is_what_the_other_rules_make():
    recipe = AlignRecipe(
        output="run",
        model="builtin:picture_world",
        data={"source": "picture_world"},
        pairing=Pairing(max_pairs_per_prompt=1),
    )
    generated = pa.table({"text": ["short", "long " * 9, "long " * 8, "one", "two"]})
    judged = pa.table(
        {
            "prompt_id": ["p0"] * 3 + ["p1"] * 2,
            "sample": [0, 1, 2, 0, 1],
            "score": [0.0, -1.0, -1.0, 0.0, 0.0],
            "reason": pa.nulls(5, pa.string()),
        }
    )
    work = SimpleNamespace(recipe=recipe, index=1)
    tables = (SimpleNamespace(table=table) for table in (generated, judged))
    counts = pairs_left_out(work, *tables, ["p0", "p2"])
    assert counts.keys() == {"p0", "p2"}
    told = {key: count for key, count in counts["p0"].items() if key.startswith("pairs")}
    assert {key: count for key, count in told.items() if count} == {
        "pairs_all": 3,
        "pairs_small_difference": 1,
        "pairs_over_limit": 1,
        "pairs": 1,
    }
