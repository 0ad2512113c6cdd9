"""Eight simulated CPU devices, no network, and one set of tiny models for the whole session."""

import gc
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

from helpers import xla_flags

os.environ["XLA_FLAGS"] = " ".join(
    [*xla_flags.known(xla_flags.FLAGS), os.environ.get("XLA_FLAGS", "")]
)

import hypothesis
import jax
import pytest
from helpers import shapes

from mmpo_jax.core.files import cache_folder

shapes.install()

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(cache_folder(), "tests"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

from helpers import compiled, tiny  # noqa: E402

compiled.share()

hypothesis.settings.register_profile(
    "tests", derandomize=True, database=None, deadline=None, max_examples=60
)
hypothesis.settings.load_profile("tests")

MEMORY_LIMIT, MEMORY_STEP = 3 * 2**30, 2**30
"""Bytes of a test process from which compiled programs are let go of, and of its growth to the next
time: what remains then does not shrink by trying again."""
MAPS_LIMIT = 20_000
"""Memory mappings from which they are. A program has several, Linux allows a process 65,530, and
XLA crashes where it gets no more."""
memory_limit = MEMORY_LIMIT


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Thousands of tests compile more programs than a small machine can hold at once."""
    global memory_limit
    yield
    if tiny.memory_in_use() > memory_limit or tiny.memory_maps() > MAPS_LIMIT:
        compiled.programs.clear()
        jax.clear_caches()
        gc.collect()
        memory_limit = max(MEMORY_LIMIT, tiny.memory_in_use() + MEMORY_STEP)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A whole LLaVA checkpoint folder with random weights and the picture world's processor."""
    return tiny.make_folder(tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    """(model, parameters as NumPy arrays) of `tiny_folder`."""
    from mmpo_jax.checkpoints.huggingface import load_model

    return load_model(tiny_folder)


@pytest.fixture(scope="session")
def tiny_processor(tiny_folder, tiny_model):
    from mmpo_jax.data.processor import Processor

    return Processor(tiny_folder, tiny_model[0].config)


@pytest.fixture(scope="session")
def family_case(tmp_path_factory):
    """(family, whether its head is tied) -> a `checks.Case` of it, made once."""
    pytest.importorskip("torch")
    from helpers import families

    made = {}

    def family_case(name, tied=False):
        if (name, tied) not in made:
            folder = tmp_path_factory.mktemp("family") / name
            made[name, tied] = families.make_case(name, folder, tied)
        return made[name, tied]

    return family_case
