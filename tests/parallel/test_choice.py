"""Meshes over slices, and those of recipes that leave them open; the devices are described only."""

import dataclasses
import logging
import math

import numpy as np
import pytest

from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.models.layer_kinds import AttentionConfig, ExpertsConfig, LayerConfig
from mmpo_jax.parallel.choice import choose_sizes
from mmpo_jax.parallel.mesh import by_slice, make_mesh, over_slices
from mmpo_jax.recipes.base import Devices
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.plan import check_training, mesh_sizes


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX says of a TPU."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def chips(rows, columns, slices=1):
    """Chips of slices of this size, in an order that tells nothing."""
    found = [
        Chip(number * rows * columns + row * columns + column, (column, row, 0), number)
        for number in range(slices)
        for row in range(rows)
        for column in range(columns)
    ]
    return [found[at] for at in np.random.default_rng(0).permutation(len(found))]


def decoder(heads, kv_heads=None, mlp=None):
    def empty(kind, **values):
        return kind(**dict.fromkeys(f.name for f in dataclasses.fields(kind)) | values)

    mixer = empty(AttentionConfig, num_heads=heads, num_kv_heads=kv_heads or heads)
    return empty(DecoderConfig, layers=(empty(LayerConfig, mixer=mixer, mlp=mlp),))


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)])
def test_rows_go_over_slices_and_weights_stay_within(sizes):
    arranged = over_slices(sizes, by_slice(chips(2, 2, slices=2)))
    assert arranged.shape == sizes
    of_slice = np.vectorize(lambda chip: chip.slice_index)(arranged)
    per = sizes[0] // 2
    for place in range(sizes[0]):
        assert np.all(of_slice[place] == place // per)
    assert len({chip.id for chip in arranged.flat}) == 8


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"expert": 3}, "with the others as they are, expert 1 or 2 or 4 or 8 would"),
        ({"expert": 3, "tensor": 2}, "with the others as they are, expert 1 or 2 or 4 would"),
        ({"fsdp": 3, "tensor": 4}, "with the others as they are, fsdp 2 would"),
        ({"fsdp": 4, "tensor": 4}, "with the others as they are, fsdp 2, tensor 2 would"),
        ({"fsdp": 3, "tensor": 5}, "sizes have to multiply to 8, and one may be -1"),
        ({"fsdp": -1, "tensor": -1}, "one size may be -1, for what the others leave"),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_those_that_would(given, told):
    with pytest.raises(MmpoError, match=f"does not fit 8 devices; {told}"):
        make_mesh(**given)


def test_the_experts_of_a_dense_model_are_told(tiny_folder, caplog):
    caplog.set_level("INFO")
    load_checkpoint(str(tiny_folder), make_mesh(expert=2))
    assert f"{tiny_folder}: no mixture of experts, so the mesh's expert 2 is a part of fsdp" in (
        caplog.messages
    )


def test_what_does_not_go_over_slices_is_refused():
    slices = by_slice(chips(2, 2, slices=2))
    with pytest.raises(MmpoError, match=r"devices.data is 1, of 2 slices: .*devices.data=2"):
        over_slices((1, 8, 1), slices)
    with pytest.raises(MmpoError, match=r"a multiple of 3"):
        over_slices((4, 3, 1), by_slice(chips(2, 2, slices=3)))
    with pytest.raises(MmpoError, match="the slices have 4, 3 devices"):
        over_slices((2, 2, 1), [slices[0], slices[1][:3]])


def test_only_slices_of_tpus_count():
    """GPUs and CPUs number their hosts so, which share a fast network."""
    hosts = [dataclasses.replace(chip, platform="gpu") for chip in chips(2, 2, slices=2)]
    assert len(by_slice(hosts)) == 1
    assert make_mesh().shape == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    ("shape", "rows", "heads", "expected"),
    [
        # Every chip has rows of its own.
        ((8, 8, 1), 256, (32, 32), (1, 64, 1)),
        # RLAIF-V's batch, of LLaVA-1.5-7B and of the heads that eight divides.
        ((8, 8, 1), 8, (32, 32), (1, 8, 8)),
        ((8, 8, 1), 8, (64, 8), (1, 8, 8)),
        # More heads than keys and values: fewer chips on `tensor`, if rows allow it.
        ((4, 4, 1), 8, (28, 4), (1, 8, 2)),
        ((4, 4, 1), 4, (28, 4), (1, 4, 4)),
        ((8, 8, 1), 48, (32, 8), (1, 16, 4)),
        # `data` is the number of slices.
        ((4, 4, 2), 64, (32, 32), (2, 16, 1)),
        ((4, 4, 2), 8, (32, 32), (2, 4, 4)),
    ],
)
def test_sizes_for_rows(shape, rows, heads, expected):
    choice = choose_sizes(chips(*shape), rows, decoder(*heads))
    assert tuple(choice.sizes.values()) == expected
    assert math.prod(expected) == math.prod(shape)
    assert "heads" not in choice.why


@pytest.mark.parametrize(
    ("shape", "experts", "top_k", "expected"),
    [
        ((8, 8, 1), 128, 8, {"data": 1, "fsdp": 8, "tensor": 1, "expert": 8}),
        ((4, 4, 2), 128, 8, {"data": 2, "fsdp": 2, "tensor": 1, "expert": 8}),
        ((8, 8, 1), 60, 4, {"data": 1, "fsdp": 16, "tensor": 1, "expert": 4}),
        ((4, 4, 1), 128, 6, {"data": 1, "fsdp": 4, "tensor": 1, "expert": 4}),
        ((4, 4, 1), 5, 2, {"data": 1, "fsdp": 16, "tensor": 1}),
    ],
)
def test_a_mixture_has_a_part_of_fsdp_for_its_experts(shape, experts, top_k, expected):
    """No more than a token's experts, and they divide all of them."""
    of_layer = ExpertsConfig(experts, top_k, 8, "silu", normalised=True)
    choice = choose_sizes(chips(*shape), 64, decoder(32, mlp=of_layer))
    assert choice.sizes == expected


def test_heads_that_tensor_does_not_divide_are_told_of():
    choice = choose_sizes(chips(8, 8), 8, decoder(28, 4))
    assert tuple(choice.sizes.values()) == (1, 8, 8)
    assert "8 does not divide the 28 heads" in choice.why


def test_too_few_rows_are_refused_by_the_training():
    choice = choose_sizes(chips(8, 8), 7, decoder(32))
    assert tuple(choice.sizes.values()) == (1, 64, 1)
    assert "too few for 64 devices" in choice.why


def test_what_would_do_is_said(tiny_model):
    config = Training(objective={"type": "dpo"}, batch_size=4)
    with pytest.raises(MmpoError, match=r"multiple of 8, or .* devices.fsdp=4 devices.tensor=-1"):
        check_training(config, tiny_model[0], make_mesh(1, 8, 1))


def test_sizes_of_a_recipe(tiny_model, caplog):
    decoder = tiny_model[0].config.decoder
    config = Training(objective={"type": "dpo"}, batch_size=4)
    with caplog.at_level(logging.INFO):
        chosen = mesh_sizes(Devices(), config, decoder)
        assert make_mesh(**chosen).shape == {"data": 1, "fsdp": 4, "tensor": 2}
    assert "4 rows at a time are split over 4 of 8 devices, weights over all" in caplog.text
    assert "mesh data 1 x fsdp 4 x tensor 2 of 8 devices" in caplog.text
    given = Devices(tensor=4)
    assert make_mesh(**mesh_sizes(given, config, decoder)).shape["tensor"] == 4
