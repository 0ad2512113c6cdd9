"""Decoders of unlike layers: how their layers lie together, and that scans run them in order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.models.layer_kinds import AttentionConfig, LayerConfig, MlpConfig, segments_of
from mmpo_jax.models.layers import rematerialise
from mmpo_jax.models.rope import Rope
from mmpo_jax.models.scanning import scan_segment


def layers(kinds):
    """A layer for every letter."""
    base = AttentionConfig(1, 1, 4, Rope((1.0, 0.1)), 0.5, 0, None, False, False, False)
    mlp = MlpConfig(4, "silu", False)
    return tuple(
        LayerConfig(kind, dataclasses.replace(base, window=ord(kind)), mlp) for kind in kinds
    )


def told(kinds):
    return [
        (segment.repeats, [(stack.path, stack.count) for stack in segment.stacks])
        for segment in segments_of(layers(kinds))
    ]


def test_a_uniform_decoder_is_one_stack():
    assert told("a" * 9) == [(1, [("layers", 9)])]
    assert told("a") == [(1, [("layers", 1)])]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaaab" * 3, [(3, [("layers/a", 5), ("layers/b", 1)])]),
        ("aab" * 2 + "aa", [(2, [("layers/a", 2), ("layers/b", 1)]), (1, [("layers/a_2", 2)])]),
        ("aaabbbb", [(1, [("layers/a", 3), ("layers/b", 4)])]),
        ("ab" * 3, [(3, [("layers/a", 1), ("layers/b", 1)])]),
        ("c" + "ab" * 3, [(1, [("layers/c", 1)]), (3, [("layers/a", 1), ("layers/b", 1)])]),
    ],
)
def test_patterns_are_found(kinds, expected):
    assert told(kinds) == expected


@pytest.mark.parametrize("kinds", ["aaaaab" * 3 + "aaaa", "aabac" * 2 + "a", "abcabd"])
def test_every_layer_is_in_one_place(kinds):
    stacks = [stack for segment in segments_of(layers(kinds)) for stack in segment.stacks]
    assert sorted(number for stack in stacks for number in stack.numbers) == [*range(len(kinds))]
    assert len({stack.path for stack in stacks}) == len(stacks)
    for stack in stacks:
        assert {kinds[number] for number in stack.numbers} == {stack.layer.name}


def test_layers_that_read_others_keys_are_in_segments_of_their_own():
    """What they read comes out of an earlier scan: that of the last layer of a kind with its own,
    which is a stack by itself."""
    kinds = layers("aab" * 2 + "AAB" * 2)
    sources = {"A": 4, "B": 5}

    def shared(number, layer):
        mixer = dataclasses.replace(
            layer.mixer, is_kv_source=number in (4, 5), kv_source=sources.get(layer.name)
        )
        return dataclasses.replace(layer, mixer=mixer)

    changed = tuple(shared(number, layer) for number, layer in enumerate(kinds))
    found = segments_of(changed)
    for segment in found:
        assert len({stack.layer.mixer.kv_source is None for stack in segment.stacks}) == 1
    stacks = [stack for segment in found for stack in segment.stacks]
    assert [s.numbers for s in stacks if s.layer.mixer.is_kv_source] == [(4,), (5,)]
    assert found[-1].repeats == 2
    decoder = DecoderConfig(8, 4, changed, 1e-6, True)
    for stack in stacks:
        expected = sources.get(stack.layer.name)
        source = decoder.kv_source(stack)
        assert source.numbers == ((expected,) if expected else stack.numbers)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scans_run_layers_in_order(remat):
    """x -> x * own + number of layers before, with gradients, for a pattern and its rest."""
    kinds = "aaab" * 3 + "aa"
    weights = np.linspace(0.5, 1.5, len(kinds))

    def expected(weights):
        x, seen = jnp.ones(3), []
        for number in range(len(kinds)):
            seen.append(x)
            x = jnp.sin(x) * weights[number] + number
        return x.sum(), jnp.stack(seen)

    def scanned(weights, in_place):
        state, seen = jnp.ones(3), jnp.zeros((len(kinds), 3))
        for segment in segments_of(layers(kinds)):

            def body(x, given):
                own, number = given
                return jnp.sin(x) * own + number, x

            given = {
                s.path: (weights[np.array(s.numbers)], np.array(s.numbers)) for s in segment.stacks
            }
            bodies = dict.fromkeys(given, rematerialise(body, remat))
            state, outputs = scan_segment(segment, bodies, state, given, in_place=in_place)
            for stack in segment.stacks:
                seen = seen.at[np.array(stack.numbers)].set(outputs[stack.path])
        return state.sum(), seen

    for in_place in (False, True):
        found = jax.value_and_grad(scanned, has_aux=True)(weights, in_place)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
            found,
            jax.value_and_grad(expected, has_aux=True)(weights),
        )
