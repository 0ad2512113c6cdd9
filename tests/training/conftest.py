"""A training loop on a few pairs, for the modules that test it."""

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.loop_runs import CONFIG, IDENTITY, LENGTHS, ROWS, make_record
from jax.sharding import AxisType

from mmpo_jax.core.trees import flatten
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.parallel.mesh import AXES
from mmpo_jax.scoring.log_probs import score_records
from mmpo_jax.training import loop
from mmpo_jax.training.loop import train


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


@pytest.fixture(scope="module")
def examples(tiny_model, tiny_processor, mesh):
    """Pairs whose reference is the tiny model itself."""
    records, skipped = tokenize_records(
        [make_record(number) for number in range(ROWS)], tiny_processor, LENGTHS
    )
    assert not skipped
    sums = score_records(*tiny_model, tiny_processor, records, LENGTHS, mesh, 4)
    return [tiny.example(record, row) for record, row in zip(records, sums, strict=True)]


@pytest.fixture(scope="module")
def run(tiny_model, tiny_processor, examples, mesh):
    """Trains into a folder; returns the parameters by path. Equal steps are compiled once."""
    steps = {}
    make_step = loop.make_step

    def run(folder, examples=examples, config=CONFIG, identity=IDENTITY, mesh=mesh):
        def make_once(*args):
            key = config.model_dump_json(), mesh
            if key not in steps:
                steps[key] = make_step(*args)
            return steps[key]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "make_step", make_once)
            params = train(
                *tiny_model,
                tiny_processor,
                examples,
                config,
                LENGTHS,
                mesh,
                folder=str(folder),
                identity=identity,
                seed=0,
            )
        return {path: np.asarray(leaf) for path, leaf in flatten(params).items()}

    return run


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """(run folder, its parameters); do not write there."""
    folder = tmp_path_factory.mktemp("undisturbed") / "train"
    return folder, run(folder)
