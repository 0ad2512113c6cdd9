"""Benchmarks with a judge: MMHal, LLaVA-Bench, RefoMB on judgements made up here, in the layouts of
their authors and asked of a server on this machine."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.benchmarks import assert_rows_add_up, published, write
from helpers.chat_server import ChatTestServer, question, reply

from mmpo_jax.benchmarks.judging import Judge
from mmpo_jax.benchmarks.llava_bench import UNREAD, read_scores
from mmpo_jax.benchmarks.mmhal import TYPES, rating
from mmpo_jax.benchmarks.refomb import verdict
from mmpo_jax.benchmarks.score_files import score_answers
from mmpo_jax.cli import main
from mmpo_jax.core.errors import MmpoError


@pytest.fixture
def score(tmp_path):
    """Scores of rows in files: of answers, and of judgements if there are any."""

    def score(name, answers, judgements=None, data=tmp_path, **options):
        given = write(tmp_path / "answers.jsonl", answers)
        if judgements is not None:
            judgements = write(tmp_path / "reviews.jsonl", judgements)
        judge = Judge(given=judgements)
        return score_answers(name, str(data), given, str(tmp_path / "out.json"), options, judge)

    return score


def ask(name, data, answers, tmp_path, server, *more):
    """The output of the command, with a judge that is asked."""
    given, output = write(tmp_path / "answers.jsonl", answers), tmp_path / "out.json"
    command = ["evaluate", "--benchmark", name, "--data", str(data), "--responses", given]
    command += ["--output", str(output), "--judge", f"url={server.url}", "--judge", "model=judge"]
    assert main([*command, *more]) == 0
    return json.loads(output.read_text())


# MMHal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("review", "read"),
    [
        ("It is right.\n- **Rating: 4**, somewhat", 4),
        ("RATING: 6", 6),
        ("Rating: 4.5", 4),
        ("Rating: 14", 1),
        ("Rating : 4", None),
        ("Rating: 6 or Rating: 4", None),
        ("Rating: 3 - yes, rating: 3", 3),
        ("Rating: 7", None),
        ("", None),
    ],
)
def test_how_mmhal_reads_reviews(review, read):
    assert rating(review) == read


def mmhal_reviews(ratings):
    texts = [f"Why.\nRating: {rating}" for rating in ratings]
    return [{"model": "gpt-4", "choices": [{"message": {"content": text}}]} for text in texts]


def test_mmhal_by_reviews_as_they_are_published(score):
    ratings = [(7 * place) % 9 for place in range(96)]  # 7 and 8 cannot be read
    answers = [{"text": "Assistant: two words"}] * 96
    scores = score("mmhal", answers, mmhal_reviews(ratings))
    counted = np.where(np.array(ratings) > 6, 0, ratings)
    expected = {
        "Average score": counted.mean(),
        "Hallucination rate": (counted < 3).mean(),
        "Informativeness": np.where(counted >= 3, counted - 3, counted).mean() / 3 * 100,
    }
    expected |= {f"Average score: {t}": counted[n::8].mean() for n, t in enumerate(TYPES)}
    assert scores.metrics == pytest.approx(expected)
    assert scores.beside["unparsed"] == sum(np.array(ratings) > 6)
    assert scores.beside["words"] == 2
    assert_rows_add_up("mmhal", scores)
    kept = np.array([k for k in ratings if k < 7])
    assert score(
        "mmhal", answers, mmhal_reviews(ratings), unparsed="left_out"
    ).metrics["Average score"] == pytest.approx(kept.mean())  # fmt: skip
    merged = [{"gpt4_review": f"Rating: {k}", "model_answer": "x"} for k in ratings]
    assert score("mmhal", merged).metrics == pytest.approx(expected)
    with pytest.raises(MmpoError, match="has 95 reviews, not 96"):
        score("mmhal", answers, mmhal_reviews(ratings[:95]))


TEMPLATE = [
    {
        "question_type": TYPES[place % 8],
        "image_id": f"i{place}",
        "image_src": f"https://images/{place}.jpg",
        "image_content": ["Cat", "Dog"],
        "question": f"What is {place}?",
        "gt_answer": f"It is {place}.",
        "model_answer": "",
    }
    for place in range(8)
]


def template_in(folder):
    folder.mkdir()
    (folder / "response_template.json").write_text(json.dumps(TEMPLATE))
    return folder


def test_mmhal_takes_types_by_ids_where_reviews_have_them(score, tmp_path):
    data = template_in(tmp_path / "data")
    answers = [{"id": f"i{place}", "response": "x " * place} for place in range(8)]
    reviews = [{"id": f"i{place}", "review": f"Rating: {place}"} for place in (5, 3)]
    scores = score("mmhal", answers, [*reviews, {"id": "i6", "review": None}], data)
    assert scores.metrics["Average score"] == 4
    assert [scores.metrics[f"Average score: {TYPES[place]}"] for place in (5, 3)] == [5, 3]
    assert scores.beside["without_judgement"] == 1 and scores.beside["unparsed"] == 0
    assert [len(row["answer"].split()) for row in scores.rows] == [5, 3, 6]
    with pytest.raises(MmpoError, match="row 2: there is no question 'i9' in "):
        score("mmhal", answers, [reviews[0], {"id": "i9", "review": "Rating: 1"}], data)
    with pytest.raises(MmpoError, match="row 2: has no id, which other rows have"):
        score("mmhal", [answers[0], {"response": "x"}], reviews, data)


def test_mmhal_asks_a_judge(tmp_path):
    template_in(tmp_path / "data")
    answers = [{"id": f"i{place}", "response": f"said {place}"} for place in (3, 5)]

    def script(body, seen):
        return reply(body, "Rating: 5" if "said 3" in question(body) else "none", model="j-1")

    with ChatTestServer(script) as server:
        found = ask("mmhal", tmp_path / "data", answers, tmp_path, server)
    asked = question(server.bodies[0])
    assert all(text in asked for text in ("Cat, Dog", "What is 3?", "It is 3.", "said 3"))
    assert server.bodies[0]["temperature"] == 0 and len(server.bodies[0]["messages"]) == 1
    assert found["metrics"]["Average score"] == 2.5 and found["beside"]["unparsed"] == 1
    assert found["metrics"]["Average score: counting"] == 5
    judges = found["judges"]["mmhal-1"]
    assert judges["models"] == {"j-1": 2} and judges["official_judge"] == "gpt-4-0314"
    assert [row["review"] for row in found["rows"]] == ["Rating: 5", "none"]


def test_a_judge_is_asked_in_the_words_of_the_authors_script_where_it_lies_there(tmp_path):
    template_in(tmp_path / "data")
    text = "import nothing_there\ntemplate = '''Judge {}: {} / {} / {}\n'''\nraise SystemExit\n"
    (tmp_path / "data" / "eval_gpt_mmhal.py").write_text(text)
    answers = [{"text": f"Assistant: {place} {{}}\n"} for place in range(8)]
    with ChatTestServer(lambda body, seen: reply(body, "Rating: 1")) as server:
        found = ask("mmhal", tmp_path / "data", answers, tmp_path, server)
    assert "Judge Cat, Dog: What is 7? / It is 7. / 7 {}\n" in server.questions
    assert re.fullmatch("mmhal-official-[0-9a-f]{8}", *found["judges"])


# LLaVA-Bench --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("review", "read"),
    [
        ("8 7\nBecause", (8, 7)),
        ("8.5,9", (8.5, 9)),
        ("9, 6.5\nfine", UNREAD),
        ("8 7 \nblank", UNREAD),
        ("Assistant 1: 8", UNREAD),
        ("8/10 7/10", UNREAD),
        ("", UNREAD),
    ],
)
def test_how_llava_bench_reads_reviews(review, read):
    assert read_scores(review) == read


@published
def test_llava_bench_as_both_official_summaries(score):
    folder = Path(os.environ["MMPO_EVALUATION_DATA"]) / "llava_bench_coco"
    expected = json.loads((folder / "llava_bench_expected.json").read_text())
    reviews = expected["reviews"]
    for row in reviews:
        assert read_scores(row["content"]) == tuple(row["tuple"])
    answers = [{"question_id": row["question_id"], "text": "x"} for row in reviews]
    _, *lines, _ = expected["printed_llava (category, relative, gpt4 x10, model x10)"]
    metrics = score("llava_bench", answers, reviews, folder).metrics
    names = list(dict.fromkeys(name.split(":")[0] for name in metrics))
    assert [
        f"{name} {metrics[name]} {metrics[f'{name}: reference']} {metrics[f'{name}: model']}"
        for name in names
    ] == lines
    _, _, *lines, _ = expected["printed_rlhfv (category, [means], relative)"]
    metrics = score("llava_bench", answers, reviews, folder, summary="rlhf_v").metrics
    names = list(dict.fromkeys(name.split(":")[0] for name in metrics))
    assert [
        f"{name} {[metrics[f'{name}: reference'], metrics[f'{name}: model']]} {metrics[name]}"
        for name in names
    ] == lines


def llava_files(folder):
    folder.mkdir()
    kinds = ("conv", "detail")
    rows = [
        {"question_id": n, "image": "a.jpg", "text": f"ask {n}", "category": kinds[n]}
        for n in (0, 1)
    ]
    write(folder / "qa90_questions.jsonl", rows)
    references = [{"question_id": n, "text": f"best {n}"} for n in (0, 1)]
    write(folder / "qa90_gpt4_answer.jsonl", references)
    box = {"category": "cat", "bbox": [0.5, 0.25]}
    context = {"id": "a", "image": "a.jpg", "captions": ["one", "two"], "instances": [box] * 2}
    write(folder / "caps_boxes_coco2014_val_80.jsonl", [context])
    rules = {kind: {"role": "Assistant", "prompt": f"rate {kind}"} for kind in kinds}
    (folder / "rule.json").write_text(json.dumps(rules))
    return folder


def test_llava_bench_asks_a_judge_by_the_rules_of_the_data(tmp_path):
    data = llava_files(tmp_path / "data")
    answers = [{"question_id": n, "text": f"mine {n}"} for n in (0, 1)]

    def script(body, seen):
        return reply(body, "8 6\nwell" if "mine 0" in question(body) else "8, 6")

    with ChatTestServer(script) as server:
        found = ask("llava_bench", data, answers, tmp_path, server)
        ask("llava_bench", data, answers, tmp_path, server, "--rule", "summary=rlhf_v")
        assert len(server.bodies) == 2
    assert server.bodies[0]["messages"][0]["role"] == "system"
    assert (
        "[Context]\none\ntwo\n\ncat: [0.5, 0.25]\ncat: [0.5, 0.25]\n\n[Question]\nask 0\n\n"
        "[Assistant 1]\nbest 0\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nmine 0\n\n[End of Assistant 2]\n\n[System]\nrate conv\n\n"
    ) in server.questions
    assert found["metrics"]["all"] == round(2.5 / 3.5 * 100, 1)
    assert found["metrics"]["conv"] == 75 and found["beside"]["all by rlhf_v"] == 75
    assert found["beside"]["unparsed"] == 1


def test_llava_bench_takes_categories_of_its_questions_where_reviews_have_none(score, tmp_path):
    data = llava_files(tmp_path / "data")
    answers = [{"id": n, "response": "x"} for n in (0, 1)]
    reviews = [{"id": 1, "review": "4 2\n"}, {"id": 0, "review": None}]
    scores = score("llava_bench", answers, reviews, data)
    assert scores.metrics["detail"] == scores.metrics["all"] == 50 and "conv" not in scores.metrics
    assert scores.beside["without_judgement"] == 1 and scores.beside["unparsed"] == 0
    with pytest.raises(MmpoError, match="has no `category`, and there is no question '7'"):
        score("llava_bench", answers, [{"id": 7, "review": "8 7"}], data)


# RefoMB -------------------------------------------------------------------------------------------


def test_how_refomb_reads_reviews():
    assert [verdict(text) for text in ("so [[A]]", "[[B]]", "if [[C]] or [[A]]", "[[D]]", "A")] == [
        *(-1, 1, 0),
        *(None, None),
    ]


def test_refomb_by_reviews_as_they_are_published(score):
    scores = [1, -1, 0, 1, 1, 0, -1]
    reviews = [
        {"score": value, "review": "...", "type_name": "OCR" if place else "Time series inference"}
        | {"image": place, "question": f"q{place}", "image_path_list": f"u{place}"}
        for place, value in enumerate(scores)
    ]
    answers = [
        {"question": f"q{place}", "image_url": f"u{place}", "answer": "a b c"} for place in range(7)
    ]
    found = score("refomb", answers, reviews)
    assert found.metrics["Score"] == pytest.approx(np.mean([(v + 1) / 2 for v in scores]))
    assert found.metrics["Score: OCR"] == pytest.approx(np.mean([(v + 1) / 2 for v in scores[1:]]))
    assert np.isnan(found.metrics["Hallucination score"])
    assert [found.beside[name] for name in ("wins", "ties", "losses", "words")] == [3, 2, 2, 3]
    second = [{"score": v, "review_res": "...", "type_name": "OCR"} for v in (1, 0)]
    assert score("refomb", answers, second).metrics["Hallucination score"] == 0.75


def refomb_files(folder):
    folder.mkdir()
    rows = [
        {"id": n, "image_url": f"https://images/{n}.jpg", "question": "What?", "type": "OCR"}
        | {"description": f"scene {n}", "answer": f"theirs {n}"}
        for n in (0, 1)
    ]
    write(folder / "gpt4v_RefoMB_dev_0521.jsonl", rows)
    write(folder / "RefoMB_dev.jsonl", [{**row, "answer": ""} for row in rows])
    return folder


def better_is_mine(body, seen):
    """Prefers the model's answer wherever it stands; of hallucinations it finds as many."""
    asked = question(body)
    if "[Review]" in asked:
        return reply(body, "[[C]]")
    if "scene 1" in asked:
        return reply(body, "no idea")
    return reply(body, "[[B]]" if asked.index("mine 0") > asked.index("theirs 0") else "[[A]]")


def test_refomb_asks_about_both_orders_and_hallucinations(tmp_path):
    data = refomb_files(tmp_path / "data")
    answers = [{"id": n, "response": f"mine {n}<|endoftext|>"} for n in (0, 1)]
    with ChatTestServer(better_is_mine) as server:
        found = ask("refomb", data, answers, tmp_path, server)
        assert found["metrics"] == {"Score": 1, "Hallucination score": 0.5, "Score: OCR": 1}
        assert found["beside"]["unparsed"] == 1 and len(server.bodies) == 1 + 3 + 1
        # They are asked at once, and come in any order.
        assert any("mine 0<EOT>" in question(body) for body in server.bodies)
        more = ["--rule", "order=both", "--rule", "runs=2"]
        found = ask("refomb", data, answers, tmp_path, server, *more)
    assert found["metrics"]["Score"] == 1 and found["beside"]["reviews"] == 8
    assert [one["swapped"] for one in found["rows"][0]["reviews"]] == [False, True] * 2
    reviews = write(tmp_path / "reviews.jsonl", [{"id": n, "review": "[[C]]"} for n in (0, 1)])
    given, output = write(tmp_path / "a.jsonl", answers), str(tmp_path / "o.json")
    scores = score_answers("refomb", str(data), given, output, {}, Judge(given=reviews))
    assert scores.metrics["Score"] == 0.5 and scores.beside["words"] == 2
    with pytest.raises(MmpoError, match="row 1: has no answer of GPT-4V, as gpt4v"):
        score_answers("refomb", str(data / "RefoMB_dev.jsonl"), given, output)
    by_url = [{"prompt": "What?", "image_url": "https://images/2.jpg", "text": "x"}]
    with pytest.raises(MmpoError, match="row 1: there is no such question in"):
        score_answers(
            "refomb", str(data), write(tmp_path / "a.jsonl", by_url), str(tmp_path / "o.json")
        )


# The command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--judge", "url=ftp://x", "--judge", "model=x"], "judge.url: the address of a server"),
        (["--judge", "model=x", "--judge", "heat=1"], "heat"),
        (["--judge", "url=http://127.0.0.1:9/v1"], "model"),
        (["--judgements", "{}/nowhere.jsonl"], "nowhere.jsonl"),
        (["--judgements", "{}/empty.jsonl"], "empty.jsonl: has no rows"),
        (
            ["--judgements", "{}/reviews.jsonl", "--output", "{}/reviews.jsonl"],
            "is the file of --judgements; give another one",
        ),
        ([], "needs a judge: --judge url="),
        (["--benchmark", "pope", "--judge", "model=x"], "--judge: nobody judges answers to pope"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_judge_is_named(tmp_path, capsys, words, told):
    data = llava_files(tmp_path / "data")
    (tmp_path / "empty.jsonl").write_text("")
    write(tmp_path / "reviews.jsonl", [{"question_id": 0, "content": "8 7"}])
    given = write(tmp_path / "answers.jsonl", [{"question_id": 0, "text": "x"}])
    command = ["evaluate", "--benchmark", "llava_bench", "--data", str(data), "--responses", given]
    command += ["--output", str(tmp_path / "out.json")]
    assert main([*command, *(word.format(tmp_path) for word in words)]) == 1
    assert told in capsys.readouterr().err
