"""A training loop on a few pairs, for the modules that test it."""

import numpy as np
import pytest
from helpers import meshes
from helpers.loop_runs import (
    CONFIG,
    IDENTITY,
    LENGTHS,
    ROWS,
    compiled_once,
    make_record,
    make_start,
    with_reference,
)

from mmpo_jax.core.trees import flatten
from mmpo_jax.training.batches import TrainingData
from mmpo_jax.training.loop import Run, train


@pytest.fixture(scope="module")
def mesh():
    return meshes.one_device()


@pytest.fixture(scope="module")
def examples(tiny_model, tiny_processor, mesh):
    """Pairs whose reference is the tiny model itself."""
    records = [make_record(number) for number in range(ROWS)]
    return with_reference(tiny_model, tiny_processor, records, LENGTHS, mesh, 4)


@pytest.fixture(scope="module")
def run(tiny_model, tiny_processor, examples, mesh):
    """Trains into a folder; returns the parameters by path. Equal steps are compiled once."""
    steps = {}

    def run(folder, examples=examples, config=CONFIG, identity=IDENTITY, mesh=mesh):
        with compiled_once(steps, (config.model_dump_json(), mesh)):
            params = train(
                make_start(tiny_model, tiny_processor),
                TrainingData(examples),
                config,
                LENGTHS,
                mesh,
                Run(str(folder), identity, 0),
            ).params
        return {path: np.asarray(leaf) for path, leaf in flatten(params).items()}

    return run


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """(run folder, its parameters); do not write there."""
    folder = tmp_path_factory.mktemp("undisturbed") / "train"
    return folder, run(folder)
