"""What the devices hold in a round: the start model once, and none of it when training begins."""

import jax
import pytest
from helpers.live_arrays import first_steps
from helpers.small_rounds import CoinLabeler, make_recipe

from mmpo_jax.alignment import align
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.checkpoints.fingerprints import fingerprint_model
from mmpo_jax.feedback import judges

MAKE_LABELER = judges.make_labeler

pytestmark = pytest.mark.usefixtures("stubs")


@pytest.mark.parametrize(
    "lora",
    [None, pytest.param({"rank": 2, "target": ".*/q_proj"}, marks=pytest.mark.slow)],
)
def test_training_has_its_state_alone(lora, tiny_folder, tmp_path):
    recipe = make_recipe(tmp_path, tiny_folder, evaluation=None)
    training = recipe.training.model_dump() | {"lora": lora}
    with first_steps() as beside:
        run_alignment(make_recipe(tmp_path, tiny_folder, evaluation=None, training=training))
    assert beside == [{}, {}]


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_labeler_and_start_are_one_copy_where_they_are_one_checkpoint(
    named, tiny_folder, tmp_path, monkeypatch
):
    """In the first round; later ones start from what was trained, which makes room for it."""
    made, works, left = [], [], []

    class Labeler(CoinLabeler):
        def __init__(self, checkpoint, *args, **options):
            made.append(checkpoint.fingerprint)
            ours = jax.tree.leaves(checkpoint.params)
            starts = jax.tree.leaves(works[-1].start.params)
            left.append(len(starts))
            assert all(one is other for one, other in zip(starts, ours, strict=bool(starts)))

    def run_round(work, *others):
        works.append(work)
        return original(work, *others)

    original = align.run_round
    monkeypatch.setattr(align, "run_round", run_round)
    monkeypatch.setattr(judges, "make_labeler", MAKE_LABELER)
    monkeypatch.setattr(judges, "CheckpointLabeler", Labeler)
    asked = {"type": "checkpoint"} | ({"model": str(tiny_folder)} if named else {})
    feedback = {"labeler": asked}
    run_alignment(make_recipe(tmp_path, tiny_folder, evaluation=None, feedback=feedback))
    assert made == [fingerprint_model(tiny_folder)] * 2
    assert left[0] > 0 and left[1] == 0
