"""A run that goes on with other devices than it began with."""

import contextlib

import numpy as np
import pytest
from helpers import meshes
from helpers.loop_runs import CONFIG, Killed, interrupted

from mmpo_jax.training.metrics import read_metrics
from mmpo_jax.training.reports import Reports

WIDE = CONFIG.model_copy(
    update={
        "batch_size": 8,
        "micro_batch_size": None,
        # With so large an epsilon a step is in proportion to its gradient; else AdamW makes whole
        # steps of what rounding leaves of gradients that are none.
        "optimizer": CONFIG.optimizer.model_copy(update={"epsilon": 1e-2}),
    }
)


@contextlib.contextmanager
def rows_seen():
    """Collects (step, ids of its rows)."""
    seen, add = [], Reports.add

    def note(self, started):
        seen.append((started.step, started.ids))
        add(self, started)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reports, "add", note)
        yield seen


@pytest.fixture(scope="module")
def on_one(run, tmp_path_factory):
    """(run folder, parameters, rows of all steps) of a run on one device."""
    folder = tmp_path_factory.mktemp("one") / "train"
    with rows_seen() as seen:
        return folder, run(folder, config=WIDE), seen


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 2, 1),
        pytest.param((1, 1, 2), marks=pytest.mark.slow),
        pytest.param((1, 2, 2), marks=pytest.mark.slow),
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
        pytest.param((2, 2, 2), marks=pytest.mark.slow),
    ],
    ids=lambda sizes: "data {}, fsdp {}, tensor {}".format(*sizes),
)
def test_it_goes_on_with_the_very_next_batch(run, on_one, tmp_path, sizes):
    """From one device to several after step 4, and back to one after step 6."""
    whole, params, rows = on_one
    mesh = meshes.mesh_of(*sizes)
    with rows_seen() as seen:
        for before_step, where in ((5, None), (3, mesh)):
            places = {} if where is None else {"mesh": where}
            with interrupted(before_step), pytest.raises(Killed):
                run(tmp_path, config=WIDE, **places)
        found = run(tmp_path, config=WIDE)
    assert seen == rows
    for path, leaf in params.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=2e-6, err_msg=path)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, whole))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)
