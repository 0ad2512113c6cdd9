"""Pairing compared with a second, literal implementation of RLAIF-V's rules."""

import dataclasses
import itertools
import math
import random

import pytest

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.feedback.claims import judgement_of
from mmpo_jax.feedback.labeler import Answer
from mmpo_jax.feedback.pairing import (
    Pair,
    PairingResult,
    ScoredResponse,
    length_balance,
    make_pairs,
)
from mmpo_jax.feedback.scores import (
    ClaimVerdicts,
    count_score,
    fraction_score,
    log_odds_score,
)
from mmpo_jax.recipes.feedback import ClaimsFeedback


@dataclasses.dataclass(frozen=True)
class Case:
    """A response with its claims and the labeler's answers, or the reason that it failed for."""

    prompt_id: str
    sample: int
    text: str
    claims: tuple[str, ...]
    p_yes: tuple[float, ...]
    p_no: tuple[float, ...]
    failure: str | None = None


def response(prompt_id, sample, verdicts, text=None, claims=None, failure=None):
    return Case(
        prompt_id,
        sample,
        f"{prompt_id} {sample}" if text is None else text,
        tuple(claims or (f"claim {k}" for k in range(len(verdicts)))),
        tuple(0.9 if verdict else 0.2 for verdict in verdicts),
        tuple(0.1 if verdict else 0.8 for verdict in verdicts),
        failure,
    )


def scored(case, **options):
    """The case as the judge of claims scores it."""
    questions = [f"{case.sample} {claim}?" for claim in case.claims]
    row = {
        "claims": list(case.claims),
        "questions": questions,
        "unparsed": [],
        "failure": case.failure,
        "raw": None,
    }
    answers = dict(zip(questions, map(Answer, case.p_yes, case.p_no), strict=True))
    judgement = judgement_of(row, answers, ClaimsFeedback(**options))
    return ScoredResponse(case.prompt_id, case.sample, case.text, judgement.score, judgement.reason)


def combine(cases, *, score="count", duplicate_claims="keep", **settings):
    """Pairs of cases."""
    options = {"score": score, "duplicate_claims": duplicate_claims}
    return make_pairs([scored(case, **options) for case in cases], **settings)


def pair(chosen_words, rejected_words, name="p"):
    return Pair(name, "c " * chosen_words, "r " * rejected_words, 0, 1, 0.0, -1.0)


def random_responses(seed, prompts=20, samples=6):
    rng = random.Random(seed)
    return [
        response(
            f"prompt {prompt}",
            sample,
            [rng.random() < 0.7 for _ in range(rng.randrange(0, 6))],
            text=" ".join("w" * rng.randrange(1, 3) for _ in range(rng.randrange(1, 8))) + " ",
            failure="no_json" if rng.random() < 0.1 else None,
        )
        for prompt in range(prompts)
        for sample in range(samples)
    ]


def literal_pairs(responses):
    """All pairs of the specification before sampling, as a set of (prompt, chosen, rejected)."""
    found = set()
    for a, b in itertools.permutations(responses, 2):
        if a.prompt_id != b.prompt_id or not a.claims or not b.claims:
            continue
        if a.failure or b.failure:
            continue
        score_a = sum(1 if y > n else 0 for y, n in zip(a.p_yes, a.p_no, strict=True)) - len(
            a.claims
        )
        score_b = sum(1 if y > n else 0 for y, n in zip(b.p_yes, b.p_no, strict=True)) - len(
            b.claims
        )
        if score_a - score_b >= 1 and a.text.strip() != b.text.strip():
            found.add((a.prompt_id, a.sample, b.sample))
    return found


def literal_length_balance(pairs):
    best_ratio, best = math.inf, []
    for step in range(50):
        kept = []
        for p in pairs:
            chosen, rejected = len(p.chosen.split()), len(p.rejected.split())
            if rejected and round((rejected - chosen) / rejected - step * 0.02, 9) > 0:
                continue
            kept.append(p)
        if not kept:
            continue
        mean_chosen = sum(len(p.chosen.split()) for p in kept) / len(kept)
        mean_rejected = sum(len(p.rejected.split()) for p in kept) / len(kept)
        ratio = abs(mean_chosen - mean_rejected) / mean_rejected if mean_rejected else math.inf
        if round(ratio - best_ratio, 9) < 0:
            best_ratio, best = ratio, kept
    return best


def keys(result: PairingResult):
    return [(p.prompt_id, p.chosen_sample, p.rejected_sample) for p in result.pairs]


@pytest.mark.parametrize("seed", range(5))
def test_all_pairs_are_those_of_the_specification(seed):
    responses = random_responses(seed)
    result = combine(responses, seed=0, max_pairs_per_prompt=None, balance="none")
    assert len(keys(result)) == len(set(keys(result))) > 50
    assert set(keys(result)) == literal_pairs(responses)
    by_name = {(r.prompt_id, r.sample): r for r in responses}
    for p in result.pairs:
        assert p.chosen == by_name[p.prompt_id, p.chosen_sample].text
        rejected = by_name[p.prompt_id, p.rejected_sample]
        assert p.rejected_score == -sum(yes < 0.5 for yes in rejected.p_yes)
        assert p.chosen_score >= p.rejected_score + 1


@pytest.mark.parametrize("seed", range(5))
def test_sampled_pairs_are_a_subset_with_every_prompt_filled_up(seed):
    responses = random_responses(seed)
    everything = literal_pairs(responses)
    kept = keys(combine(responses, seed=seed, balance="none"))
    assert set(kept) <= everything
    assert kept == sorted(kept)
    for prompt in {prompt for prompt, _, _ in everything}:
        possible = sum(key[0] == prompt for key in everything)
        assert sum(key[0] == prompt for key in kept) == min(2, possible)


@pytest.mark.parametrize("seed", range(8))
def test_length_balance_is_the_one_of_the_specification(seed):
    rng = random.Random(seed)
    pairs = [pair(rng.randrange(0, 40), rng.randrange(0, 60), str(i)) for i in range(80)]
    balanced, threshold = length_balance(pairs, "rlaif_v")
    assert balanced == literal_length_balance(pairs)
    assert 0 <= threshold <= 0.98
    assert len(balanced) < len(pairs)


def test_sampling_depends_on_one_prompt_only():
    responses = random_responses(1)
    expected = keys(combine(responses, seed=3, balance="none"))
    shuffled = random.Random(0).sample(responses, len(responses))
    assert keys(combine(shuffled, seed=3, balance="none")) == expected
    alone = [r for r in responses if r.prompt_id == "prompt 7"]
    part = [key for key in expected if key[0] == "prompt 7"]
    assert keys(combine(alone, seed=3, balance="none")) == part


def test_sampling_changes_with_seed_and_round_and_not_otherwise():
    responses = random_responses(1)
    results = [
        tuple(keys(combine(responses, seed=seed, round_number=number, balance="none")))
        for seed, number in [(0, 0), (0, 0), (1, 0), (0, 1)]
    ]
    assert results[0] == results[1]
    assert len(set(results)) == 3


def test_sampling_is_uniform():
    # 1 good and 4 bad responses: 4 pairs, of which 2 are kept; each pair half of the time.
    drawn = [0] * 5
    for number in range(2000):
        responses = [response(f"p{number}", k, [k == 0]) for k in range(5)]
        for _, _, rejected in keys(combine(responses, seed=0, balance="none")):
            drawn[rejected] += 1
    assert sum(drawn) == 4000
    # Standard deviation of each count: sqrt(2000) / 2 = 22.4.
    assert all(abs(count - 1000) < 100 for count in drawn[1:])


def test_counts_account_for_everything():
    responses = random_responses(0)
    counts = combine(responses, seed=0).counts
    assert counts["responses"] == len(responses) == 120
    assert counts["prompts"] == 20
    failed = sum(r.failure is not None for r in responses)
    assert counts["responses_no_json"] == failed > 0
    without = sum(not r.claims and not r.failure for r in responses)
    assert counts["responses_no_claims"] == without > 0
    assert counts["responses_usable"] == 120 - failed - without
    assert counts["pairs_all"] == (
        counts["pairs_small_difference"]
        + counts["pairs_same_text"]
        + counts["pairs_over_limit"]
        + counts["pairs_length"]
        + counts["pairs"]
    )
    assert counts["pairs_over_limit"] > 0
    assert counts["pairs_same_text"] > 0
    assert counts["pairs_length"] > 0
    assert counts["pairs"] == len(combine(responses, seed=0).pairs)


def test_a_prompt_without_pairs_is_counted():
    result = combine([response("a", 0, [True]), response("a", 1, [True])], seed=0)
    assert result.pairs == ()
    assert result.counts["prompts_without_pairs"] == 1
    assert result.counts["pairs_small_difference"] == 1
    assert result.length_threshold is None


def test_nothing_in_nothing_out():
    result = combine([], seed=0)
    assert result.pairs == ()
    assert set(result.counts.values()) == {0}


def test_a_tie_of_yes_and_no_is_rejected():
    assert ClaimVerdicts(("c",), (0.4,), (0.4,)).verdicts == (False,)


def test_scores():
    assert count_score([True, False, False]) == -2
    assert count_score([]) == 0
    assert fraction_score([True, False, False, True]) == 0.5
    assert log_odds_score([0.8, 0.1], [0.2, 0.3]) == pytest.approx(math.log(4) + math.log(1 / 3))
    assert math.isfinite(log_odds_score([0.0], [1.0]))
    with pytest.raises(ValueError, match="needs a claim"):
        fraction_score([])


def test_score_and_difference_are_those_asked_for():
    responses = [response("a", 0, [True, False, False, False]), response("a", 1, [False, False])]
    # Fewer rejected claims against a larger share of accepted ones.
    assert keys(combine(responses, seed=0)) == [("a", 1, 0)]
    by_share = combine(responses, seed=0, score="fraction", min_difference=0.25)
    assert keys(by_share) == [("a", 0, 1)]
    assert combine(responses, seed=0, score="fraction", min_difference=0.26).pairs == ()
    # log(9) - 3 log(4) against -2 log(4): 0.81 apart.
    by_odds = combine(responses, seed=0, score="log_odds", min_difference=0.8)
    assert keys(by_odds) == [("a", 0, 1)]
    assert combine(responses, seed=0, score="log_odds", min_difference=0.82).pairs == ()


def test_duplicate_claims():
    responses = [
        response("a", 0, [True]),
        response("a", 1, [False, False], claims=("same", "same")),
    ]
    kept = combine(responses, seed=0)
    assert kept.pairs[0].rejected_score == -2
    assert kept.counts["responses_usable"] == 2
    dropped = combine(responses, seed=0, duplicate_claims="drop_response")
    assert dropped.pairs == ()
    assert dropped.counts["responses_duplicate_claims"] == 1
    assert dropped.counts["responses_usable"] == 1


def test_same_text_apart_from_white_space_is_no_pair():
    responses = [response("a", 0, [True], text="x y\n"), response("a", 1, [False], text=" x y")]
    result = combine(responses, seed=0)
    assert result.pairs == ()
    assert result.counts["pairs_same_text"] == 1


def test_threshold_is_inclusive_and_exact():
    # (50 - 47) / 50 = 0.06, which floats do not meet exactly: 3 * 0.02 > 0.06.
    balanced, threshold = length_balance([pair(47, 50)])
    assert (len(balanced), threshold) == (1, 0.06)


def test_empty_texts_are_survived():
    assert length_balance([pair(3, 0)])[0] == [pair(3, 0)]
    assert length_balance([pair(0, 0)])[0] == [pair(0, 0)]
    assert length_balance([pair(0, 5)]) == ([], None)  # Shorter by all of it at every r.
    for mode in ("rlaif_v", "symmetric", "none"):
        assert length_balance([], mode) == ([], None)


def test_symmetric_drops_what_rlaif_v_cannot():
    even = [pair(10, 10, str(i)) for i in range(20)]
    long_chosen = [pair(60, 10, f"long {i}") for i in range(5)]
    assert length_balance(even + long_chosen, "symmetric")[0] == even
    assert length_balance(even + long_chosen, "rlaif_v")[0] == even + long_chosen
    long_rejected = [pair(10, 60, f"long {i}") for i in range(5)]
    assert length_balance(even + long_rejected, "symmetric")[0] == even


def test_symmetric_keeps_a_balanced_set_whole():
    pairs = [pair(10, 30), pair(30, 10), pair(1, 1)]
    assert length_balance(pairs, "symmetric") == (pairs, 1.0)


def test_none_keeps_everything():
    assert length_balance([pair(1, 50)], "none") == ([pair(1, 50)], None)


@pytest.mark.parametrize(
    "setting",
    [
        {"min_difference": 0},
        {"min_difference": math.nan},
        {"max_pairs_per_prompt": 0},
        {"balance": "half"},
    ],
)
def test_settings_out_of_range(setting):
    with pytest.raises(MmpoError, match=next(iter(setting))):
        combine([], seed=0, **setting)


def test_bad_responses():
    with pytest.raises(DataError, match="2 claims, 1 p_yes, 1 p_no"):
        ClaimVerdicts(("c", "d"), (0.4,), (0.4,)).check()
    with pytest.raises(DataError, match="probability"):
        ClaimVerdicts(("c",), (math.nan,), (0.4,)).check()
    with pytest.raises(DataError, match="response 0 to prompt 'a' occurs twice"):
        combine([response("a", 0, [True])] * 2, seed=0)


def test_chosen_responses_that_are_not_good_enough_are_counted():
    cases, least = random_responses(3), 0.0
    settings = {"seed": 0, "max_pairs_per_prompt": None, "balance": "none"}
    result = combine(cases, **settings, chosen_at_least=least)
    score_of = {(case.prompt_id, case.sample): scored(case).score for case in cases}
    wanted = {
        (prompt, chosen, rejected)
        for prompt, chosen, rejected in literal_pairs(cases)
        if score_of[prompt, chosen] >= least
    }
    made = {(p.prompt_id, p.chosen_sample, p.rejected_sample) for p in result.pairs}
    assert made == wanted
    assert result.counts["pairs_chosen_too_low"] == len(literal_pairs(cases)) - len(wanted) > 0
    assert "pairs_chosen_too_low" not in combine(cases, **settings).counts
