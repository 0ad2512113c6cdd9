"""What tests of alignment share."""

import shutil

import pytest
from helpers import meshes
from helpers.small_rounds import CoinLabeler, WordSplitter, make_recipe

from mmpo_jax.alignment import align
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.feedback import judges


@pytest.fixture(scope="module")
def one_device():
    """One device, whatever mesh a recipe says."""
    mesh = meshes.one_device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "make_mesh", lambda **sizes: mesh)
        yield


@pytest.fixture(scope="module")
def stubs(one_device):
    """One device, and feedback that a random model can earn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "make_splitter", lambda *args: (WordSplitter(), []))
        patch.setattr(judges, "make_labeler", lambda *args: (CoinLabeler, "coin", lambda: None))
        yield


@pytest.fixture(scope="module")
def finished(stubs, tiny_folder, tmp_path_factory):
    """(output folder, its reports); do not write there."""
    output = tmp_path_factory.mktemp("align") / "run"
    return output, run_alignment(make_recipe(output, tiny_folder))


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")
