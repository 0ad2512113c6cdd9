"""What tests against TRL and the authors' code share."""

import jax
import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.huggingface import save_model


@pytest.fixture(scope="session")
def close_folders(tiny_folder, tiny_model, tmp_path_factory):
    """(policy, reference); they are close, so that no loss is in its flat part."""
    model, params = tiny_model
    other = tiny.random_params(model, seed=7)
    mixed = jax.tree.map(lambda a, b: np.float32(0.9 * a + 0.1 * b), params, other)
    folder = tmp_path_factory.mktemp("reference") / "llava"
    save_model(folder, model, mixed, tiny_folder)
    return tiny_folder, folder
