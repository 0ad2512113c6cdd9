"""Implicit rewards against transformers' models in float64."""

import copy
import dataclasses

import numpy as np
import pytest
from helpers import meshes

torch = pytest.importorskip("torch")
from helpers import checks, families  # noqa: E402

import mmpo_jax as mm  # noqa: E402
from mmpo_jax.data.records import Response  # noqa: E402
from mmpo_jax.data.tokenization import tokenize  # noqa: E402

pytestmark = pytest.mark.parity


def answers(processor):
    """A text; tokens that its text would not become; an empty response; one that was cut."""
    star = processor.tokenizer.convert_tokens_to_ids("star")
    return (
        Response.of("two blue ring and a star"),
        Response.of("star", token_ids=(star, checks.PAD_ID, checks.EOS_ID)),
        Response.of("", token_ids=(checks.EOS_ID,)),
        Response.of("a red", finished=False),
    )


def token_log_probs(case, record, response):
    """float64[T] of a response's tokens, in a pass of its own."""
    prompt = tokenize(record, case.processor, 2**20, 2**20).prompt_ids
    ids = np.concatenate([prompt, response])
    given = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in families.inputs(case)(record, ids).items()
    }
    with torch.no_grad():
        theirs = copy.deepcopy(case.theirs).double()
        logits = theirs(input_ids=torch.tensor(ids[None]).long(), **given).logits[0]
    log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1].numpy()
    return log_probs[np.arange(len(response)), response]


@pytest.mark.parametrize("names", [("llava", "llava_next"), ("qwen3", "llama")], ids="-".join)
def test_rewards_of_two_families_with_one_tokenizer(names, family_case):
    """Their images are other numbers of tokens; the response's tokens are the same."""
    mesh = meshes.one_device()
    cases = [family_case(name) for name in names]
    policy, reference = (
        mm.Checkpoint(case.model, case.processor, case.params).placed(mesh) for case in cases
    )
    records = [
        dataclasses.replace(record, responses=answers(policy.processor))
        for record in families.records(names[0])
    ]
    summed = mm.implicit_rewards(policy, reference, records, beta=0.3, per_token=False)
    means = mm.implicit_rewards(policy, reference, records, beta=0.3)
    for place, record in enumerate(records):
        tokens = [r.ids for r in tokenize(record, policy.processor, 2**20, 2**20).responses]
        assert [len(row) for row in tokens] == [7, 3, 1, 2]
        ours, theirs = ([token_log_probs(case, record, row) for row in tokens] for case in cases)
        expected = [0.3 * (a - b).sum() for a, b in zip(ours, theirs, strict=True)]
        assert np.abs(expected).min() > 1e-3
        np.testing.assert_allclose(summed[place], expected, rtol=2e-4, atol=2e-4)
        expected = [0.3 * (a - b).mean() for a, b in zip(ours, theirs, strict=True)]
        np.testing.assert_allclose(means[place], expected, rtol=2e-4, atol=2e-4)
