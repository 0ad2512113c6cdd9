"""What a bfloat16 start samples and is evaluated in, in every round, and is trained from."""

import jax.numpy as jnp
import numpy as np
import pytest
from alignment.small_rounds import make_recipe

from mmpo_jax.alignment import align
from mmpo_jax.alignment import round as round_module
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.alignment.start import Start
from mmpo_jax.checkpoint import load_checkpoint, load_to_compute
from mmpo_jax.files import read_json
from mmpo_jax.models.huggingface import flatten, save_model, weights_dtype

pytestmark = pytest.mark.usefixtures("stubs")


@pytest.fixture(scope="module")
def seen(stubs, tiny_folder, tiny_model, tmp_path_factory):
    """(output of two rounds from bfloat16, [(what was done, dtype of its weights)] in order)."""
    folder = tmp_path_factory.mktemp("bfloat16")
    save_model(folder / "start", *tiny_model, tiny_folder, dtype="bfloat16")
    done = []

    def noting(name, function):
        def noted(*args, **options):
            done.append((name, str(weights_dtype(args[1]))))
            return function(*args, **options)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (round_module, "generate_stage"),
            (round_module, "train"),
            (align, "evaluate_shapes"),
        ):
            patch.setattr(module, name, noting(name, getattr(module, name)))
        run_alignment(make_recipe(folder / "run", folder / "start"))
    return folder / "run", done


def test_all_rounds_compute_in_the_dtype_of_the_start(seen):
    _, done = seen
    assert done == [
        ("evaluate_shapes", "bfloat16"),
        ("generate_stage", "bfloat16"),
        ("train", "bfloat16"),  # as the start's folder has it
        ("evaluate_shapes", "bfloat16"),
        ("generate_stage", "bfloat16"),
        ("train", "float32"),  # nothing of round 1 is rounded away
        ("evaluate_shapes", "bfloat16"),
    ]


def test_keys_tell_rounded_weights(seen, stubs):
    """Responses of round 2 that were sampled in float32 are not those of its bfloat16 weights."""
    output, _ = seen
    start = Start(str(output / "round-1" / "model"), align.make_mesh(), "auto", "auto", True)
    inputs = read_json(output / "round-2" / "generate.json")["inputs"]
    assert inputs["model"] == start.computing().key != start.fingerprint
    assert read_json(output / "round-2" / "train.json")["inputs"]["model"] == start.fingerprint


def test_one_form_of_the_weights_at_a_time(seen, stubs, monkeypatch):
    output, _ = seen
    start = Start(str(output / "round-1" / "model"), align.make_mesh(), "auto", "auto", True)
    for use, dtype in ((start.computing, jnp.bfloat16), (start.exact, np.float32)):
        assert weights_dtype(use().params) == dtype
        assert start._held is use() is use()
    start.release()
    assert start._held is None
    assert start.model.config.decoder  # read again


def test_a_run_computes_in_the_dtype_of_its_start(seen):
    """It is trained from as it is; rounded, what was trained is there on average."""
    output, _ = seen
    mesh, run = align.make_mesh(), str(output / "round-2" / "train")
    exact, rounded = load_checkpoint(run, mesh), load_to_compute(run, mesh)
    assert (exact.fingerprint, exact.key) == (rounded.fingerprint, exact.fingerprint)
    assert rounded.key != rounded.fingerprint
    wide, narrow = flatten(exact.params), flatten(rounded.params)
    assert {leaf.dtype for leaf in narrow.values()} == {jnp.dtype("bfloat16")}
    for path, leaf in wide.items():
        kept = np.asarray(narrow[path], np.float64)
        assert np.all(np.abs(kept - leaf) <= np.abs(leaf) / 128), path
    error = np.concatenate(
        [(np.asarray(narrow[p], np.float64) - leaf).ravel() for p, leaf in wide.items()]
    )
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)
    assert error.std() > 0
