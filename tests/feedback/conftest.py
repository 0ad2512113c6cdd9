"""What tests of judges and labelers share."""

import pytest
from helpers import meshes


@pytest.fixture(scope="module")
def mesh():
    return meshes.one_device()
