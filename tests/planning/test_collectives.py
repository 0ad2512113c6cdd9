# ruff: noqa: E501 (instructions of a program are a line each)
"""What programs over eight simulated devices exchange, with answers that are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.planning.collectives import Collective, find_collectives, summed


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(fsdp=8)


def compiled_text(function, mesh, *specs):
    """The program of a function of float32 arrays (shape, spec)."""
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec in specs
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*given).compile().as_text()


def whole(x):
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def test_an_all_gather_inside_a_scan_counts_for_every_trip(mesh):
    def function(x, layers):
        def body(x, layer):
            return jnp.tanh(x @ whole(layer)), None

        return jax.lax.scan(body, x, layers)[0]

    x, layers = ((8, 16), ("fsdp",)), ((5, 16, 16), (None, "fsdp"))
    text = compiled_text(function, mesh, x, layers)
    gathers = [one for one in find_collectives(text) if one.kind == "all-gather"]
    # A layer of 16 x 16 float32, from eight devices, of which each sends seven eighths in all.
    assert [(one.bytes, len(one.group), one.times) for one in gathers] == [(1024, 8, 5)]
    assert summed(find_collectives(text)) == {"all-gather": 5 * 1024 * 7 / 8}


def test_a_sum_over_the_rows_of_all_devices(mesh):
    text = compiled_text(lambda x: x.sum(axis=0), mesh, ((8, 64), ("fsdp",)))
    (one,) = find_collectives(text)
    assert (one.kind, one.bytes, sorted(one.group), one.times) == (
        "all-reduce",
        256,
        list(range(8)),
        1,
    )
    assert one.sent == 2 * 256 * 7 / 8


def test_loops_in_loops_multiply(mesh):
    def function(x, layers):
        def inner(x, layer):
            return jnp.tanh(x @ whole(layer)), None

        def outer(x, _):
            return jax.lax.scan(inner, x, layers)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    x, layers = ((8, 16), ("fsdp",)), ((5, 16, 16), (None, "fsdp"))
    found = find_collectives(compiled_text(function, mesh, x, layers))
    # Inside both loops, or taken out of the outer one.
    assert sum(one.times for one in found if one.bytes == 1024) in (15, 5)
    assert sum(one.times * one.bytes for one in found) in (15 * 1024, 5 * 1024)


def test_a_loop_that_data_end_has_the_trips_it_is_given(mesh):
    def function(x, layer):
        def step(state):
            x, layer = state
            split = jax.lax.with_sharding_constraint(jnp.cos(layer), PartitionSpec("fsdp"))
            return jnp.tanh(x @ whole(layer)), split

        return jax.lax.while_loop(lambda state: state[0].sum() < 3.0, step, (x, layer))

    text = compiled_text(function, mesh, ((8, 16), ()), ((16, 16), ("fsdp",)))
    once, often = (
        sum(one.times for one in find_collectives(text, loops) if one.kind == "all-gather")
        for loops in (1, 7)
    )
    assert once == 1
    assert often == 7


def test_devices_that_have_nothing_in_common_exchange_nothing(mesh):
    assert find_collectives(compiled_text(lambda x: x + 1, mesh, ((8, 8), ("fsdp",)))) == []


TPU = """\
HloModule jit_step, num_partitions=8

%fused.1 (p: bf16[16,8]) -> bf16[16,32] {
  %all-gather.1 = bf16[16,32]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}
}

%fused.2 (p: bf16[16,8]) -> bf16[16,32] {
  %all-gather.2 = bf16[16,32]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %all-reduce.1 = f32[64]{0} all-reduce(%p), channel_id=8, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}

%condition (p: (u32[], f32[64])) -> pred[] {
  %limit = u32[]{:T(128)} constant(6)
  %at = u32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%body (p: (u32[], f32[64])) -> (u32[], f32[64]) {
  %two = u32[]{:T(128)} constant(2)
  %at = u32[] get-tuple-element(%p), index=0
  %next = u32[] add(%at, %two)
  %kernel = f32[8] custom-call(%p), backend_config={"text": "
"which goes on": "in a line of its own"
}}, metadata={}
  %x = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=9, source_target_pairs={{0,0},{1,2},{2,1}}
  ROOT %out = (u32[], f32[64]) tuple(%next, %kernel)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %a = bf16[16,32] fusion(%p), kind=kLoop, calls=%fused.1
  %b = bf16[16,32] fusion(%p), kind=kLoop, calls=%fused.2
  %c = f32[16] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %w = (u32[], f32[64]) while(%p), condition=%condition, body=%body
}
"""


def test_programs_as_the_compiler_for_tpus_writes_them():
    found = {one.kind: one for one in find_collectives(TPU)}
    assert found == {
        # Spread over two fused computations, with one channel.
        "all-gather": Collective("all-gather", 16 * 32 * 2, (0, 2, 4, 6), 1),
        "reduce-scatter": Collective("reduce-scatter", 64 * 4, (0, 1, 2, 3), 1),
        # Six by steps of two.
        "collective-permute": Collective("collective-permute", 16, (1, 2), 3),
    }
    assert len(find_collectives(TPU)) == 3


def test_what_is_no_program_is_said():
    with pytest.raises(ValueError, match="no ENTRY"):
        find_collectives("HloModule nothing")
