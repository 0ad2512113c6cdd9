"""nSFT on a tiny LLaVA against torch, which reads every dialogue by itself: loss and gradient, with
and without the KL to the start model.

In float64, as the comparison with TRL.
"""

import jax
import numpy as np
import pytest
from helpers.against_trl import as_float64, assert_same_gradients

from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.correction.corrections import Error, corrected
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.training import NoReference
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.row_use import LearnedUse, field_values

torch = pytest.importorskip("torch")
from transformers import LlavaForConditionalGeneration  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

TOKENS = 64
ERRORS = (
    Error("object", "a star", "is there a red ring ?", "is there a star ?"),
    Error("count", "two rings", "is there exactly one red ring ?", "are there two red rings ?"),
)
PAIRS = [
    ("there is a red ring", "there is a star"),
    ("a red ring", "there are two red rings and a blue star"),
    ("there is a red ring in the picture", "a star"),
]


@pytest.fixture(scope="module")
def theirs(close_folders):
    return [
        LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        )
        for folder in close_folders
    ]


def make_records(layout, processor):
    """Corrected pairs as training reads them."""
    use = LearnedUse.of([make_term("nsft")], NoReference())
    made = []
    for number, (chosen, rejected) in enumerate(PAIRS):
        picture = ImageRef(f"{number}", png_bytes(sample_scene("test", 0, number), 24))
        pair = (Response.of(chosen, 1), Response.of(rejected, 2))
        asked = (Turn("user", "what is in the picture ?"),)
        record = Record(f"{number}", (picture,), asked, pair)
        record = corrected(record, ERRORS, ("yes", "no"), 0, layout)
        made.append(use.select(use.tokenize(record, processor, TOKENS, TOKENS)))
    return made


def make_batch(records, processor):
    prompts = pad_batch(
        records, processor, rows=len(records), prompt_sizes=(TOKENS,), response_sizes=(TOKENS,)
    )
    fields = [field_values(record, ["turn"]) for record in records]
    turns = [np.pad(each["turn"], ((0, 0), (0, TOKENS - each["turn"].shape[1]))) for each in fields]
    ranks = [each["rank"] for each in fields]
    return TrainBatch(prompts, {}, {"turn": np.stack(turns), "rank": np.stack(ranks)})


def their_loss(policy, reference, records, pixels, kl_weight):
    """Mean over the tokens of the chosen responses, and over those of all other answers."""
    chosen, others = [], []
    for record, picture in zip(records, pixels, strict=True):
        for place, response in enumerate(record.responses):
            ids = torch.tensor(np.concatenate([record.prompt_ids, response.ids])[None]).long()
            inputs = {"input_ids": ids, "pixel_values": torch.tensor(picture[None]).double()}
            log_probs = torch.log_softmax(policy(**inputs).logits[0, :-1], -1)
            with torch.no_grad():
                start = torch.log_softmax(reference(**inputs).logits[0, :-1], -1)
            said = -log_probs.gather(1, ids[0, 1:, None])[:, 0]
            tokens = said + kl_weight * (start.exp() * (start - log_probs)).sum(-1)
            tokens = tokens[len(record.prompt_ids) - 1 :]
            learned = np.flatnonzero(response.loss_mask)
            # The first answer of the first dialogue, up to the gap behind it, is the chosen one.
            gap = next(iter(np.flatnonzero(np.diff(learned) > 1)), len(learned) - 1) + 1
            first = learned[: gap if place == 0 else 0]
            chosen.append(tokens[first])
            others.append(tokens[np.setdiff1d(learned, first)])
    return torch.cat(chosen).mean() + torch.cat(others).mean()


@pytest.mark.parametrize("layout", ["dialogue", "apart"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_loss_and_gradient(close_folders, theirs, tiny_processor, layout, kl_weight, monkeypatch):
    records = make_records(layout, tiny_processor)
    batch = make_batch(records, tiny_processor)
    policy, reference = theirs
    policy.zero_grad()
    with monkeypatch.context() as patch:
        # Norms and head compute in float32, whatever the parameters are: not so here.
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        pixels = batch.prompts.pixel_values[:, 0]
        expected = their_loss(policy, reference, records, pixels, kl_weight)
        expected.backward()
    with jax.enable_x64(True):
        model, params = load_model(close_folders[0])
        start = as_float64(load_model(close_folders[1])[1]) if kl_weight else None
        loss = make_loss(model, [make_term("nsft", kl_weight=kl_weight)])

        def value(params):
            sums, _ = loss.sums(loss.forward(params, start, batch), batch, loss.state)
            return loss.value(sums)

        found, gradient = jax.jit(jax.value_and_grad(value))(as_float64(params))
    assert float(found) == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(model, gradient, policy)
