"""Image tokens that nobody sees: left out here, hidden by an attention mask in transformers."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from helpers import checks, families  # noqa: E402

from mmpo_jax.data.batching import pad_batch, place_media  # noqa: E402
from mmpo_jax.data.hidden_tokens import hide_image  # noqa: E402
from mmpo_jax.data.skipped import UnusableRow  # noqa: E402
from mmpo_jax.data.tokenization import tokenize  # noqa: E402

pytestmark = pytest.mark.parity


@torch.no_grad()
def their_logits(case, record, ids, hidden):
    """Of a dialogue whose tokens at some places nobody attends to."""
    mask = np.ones((1, len(ids)), int)
    mask[0, hidden] = 0
    positions = place_media(ids, tokenize(record, case.processor, 2**20, 2**20), case.processor)
    axes = positions.positions
    given = axes if len(axes) == 1 else axes[:, None]
    return case.theirs(
        input_ids=torch.tensor(ids[None]).long(),
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(given).long(),
        **families.inputs(case)(record, ids),
    ).logits[0]


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_what_is_left_out_is_what_a_mask_hides(name, tmp_path):
    case = families.make_case(name, tmp_path / name)
    record, without_image = families.records(name)
    whole = tokenize(record, case.processor, 2**20, 2**20)
    hidden = hide_image(whole, case.processor, 0.5, seed=3)
    places = np.setdiff1d(np.arange(len(whole.prompt_ids)), hidden.seen.kept)
    images = np.isin(whole.prompt_ids, case.processor.placeholders)
    assert images[places].all() and 0 < len(places) < images.sum()
    np.testing.assert_array_equal(hidden.prompt_ids, whole.prompt_ids[hidden.seen.kept])
    batch = pad_batch(
        [hidden],
        case.processor,
        rows=1,
        prompt_sizes=(len(hidden.prompt_ids) + 2,),
        response_sizes=(16,),
    )
    ours = np.asarray(checks.response_logits(case.model, case.params, batch))[0]
    for logits, response in zip(ours, whole.responses, strict=True):
        ids = np.concatenate([whole.prompt_ids, response.ids])
        shown = slice(len(whole.prompt_ids) - 1, -1)
        theirs = their_logits(case, record, ids, places)[shown].numpy()
        np.testing.assert_allclose(logits[: len(theirs)], theirs, rtol=0, atol=checks.TOLERANCE)
        unhidden = their_logits(case, record, ids, [])[shown].numpy()
        assert np.abs(theirs - unhidden).max() > 100 * checks.TOLERANCE
    with pytest.raises(UnusableRow, match="no image to hide"):
        text = tokenize(without_image, case.processor, 2**20, 2**20)
        hide_image(text, case.processor, 0.5, seed=3)


def test_all_or_nothing_is_hidden(tmp_path):
    case = families.make_case("llava", tmp_path / "llava")
    record, _ = families.records("llava")
    whole = tokenize(dataclasses.replace(record, responses=()), case.processor, 2**20, 2**20)
    nothing = hide_image(whole, case.processor, 0.0, seed=0)
    np.testing.assert_array_equal(nothing.prompt_ids, whole.prompt_ids)
    everything = hide_image(whole, case.processor, 1.0, seed=0)
    assert not np.isin(everything.prompt_ids, case.processor.placeholders).any()
    np.testing.assert_array_equal(everything.whole_prompt, whole.prompt_ids)
    draws = {hide_image(whole, case.processor, 0.5, n).seen.kept.tobytes() for n in range(4)}
    assert len(draws) > 1
    again = [hide_image(whole, case.processor, 0.5, 7).seen.kept for _ in range(2)]
    np.testing.assert_array_equal(*again)
