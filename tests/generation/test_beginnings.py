"""Samples that go on from beginnings of answers are those of prompts that end with these."""

import dataclasses

import numpy as np
import pytest
from helpers import meshes

pytest.importorskip("torch")
from helpers import checks, families
from helpers.meshes import one_device

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.records import Response, Turn
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.generation import refill
from mmpo_jax.generation.responses import sample_tokens
from mmpo_jax.recipes.sampling import Decoding

TEXTS = (
    ("a red star", "two blue ring and a star", "a ring"),
    ("this is a green ring", "red", "a star ?"),
)
ASK = "what is this ?"


def begun(name):
    """Prompts with three answers each, and behind each what the user says next."""
    return [
        dataclasses.replace(
            record,
            responses=tuple(
                Response((Turn("assistant", text), Turn("user", ASK))) for text in texts
            ),
        )
        for record, texts in zip(families.records(name), TEXTS, strict=True)
    ]


def whole(record):
    """One prompt for each of the answers, up to its own answer's end and what the user says."""
    return [
        dataclasses.replace(
            record, id=f"{record.id}#{i}", prompt=record.prompt + r.turns, responses=()
        )
        for i, r in enumerate(record.responses)
    ]


def draw(start, records, mesh, temperature, beginnings=None, batch_size=2, count=3):
    rows = [tokenize(record, start.processor, 2**20, 2**20) for record in records]
    decoding = Decoding(num_samples=count, temperature=temperature, max_new_tokens=9)
    found = sample_tokens(
        start,
        rows,
        decoding,
        fitting_lengths(rows),
        mesh,
        batch_size=batch_size,
        seed=3,
        round_index=1,
        beginnings=beginnings,
    )
    return np.concatenate(found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "mistral", "llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_text"),
        *("qwen3_5_moe", "gemma4_26b", "gemma4_e2b", "gemma4_unified"),
    ],
)
@pytest.mark.slow
def test_equal_to_prompts_of_their_own(family_case, name, temperature):
    case = family_case(name)
    start = Checkpoint(case.model, case.processor, case.params)
    records = begun(name)
    singles = [one for record in records for one in whole(record)]
    wanted = draw(start, singles, one_device(), temperature)
    names = [[f"{record.id}#{i}" for i in range(3)] for record in records]
    found = draw(start, records, one_device(), temperature, names)
    np.testing.assert_array_equal(found, wanted)
    if temperature:
        assert len({row.tobytes() for row in found}) > 9


@pytest.mark.slow
def test_windows_reach_over_the_beginning(tmp_path):
    """Layers that see the last five tokens, some of which are the prompt's."""
    import transformers

    checks.save_tokenizer(tmp_path)
    sizes = families.text_sizes((), False)
    config = transformers.MistralConfig(**sizes, sliding_window=5)
    case = checks.make_case(tmp_path, transformers.AutoModelForCausalLM.from_config(config))
    start = Checkpoint(case.model, case.processor, case.params)
    records = begun("mistral")
    names = [[f"{record.id}#{i}" for i in range(3)] for record in records]
    found = draw(start, records, one_device(), 1.0, names)
    singles = [one for record in records for one in whole(record)]
    np.testing.assert_array_equal(found, draw(start, singles, one_device(), 1.0))


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "gemma4_e2b"])
@pytest.mark.slow
def test_places_devices_and_order_change_nothing(family_case, monkeypatch, name):
    """Rows of two prompts with few places, prompts of other lengths in their places, eight devices
    with the heads split."""
    case = family_case(name)
    start = Checkpoint(case.model, case.processor, case.params)
    records = begun(name) * 4
    records = [dataclasses.replace(record, id=str(n)) for n, record in enumerate(records)]
    names = [[f"{record.id}#{i}" for i in range(3)] for record in records]
    wanted = draw(start, records, one_device(), 1.0, names, batch_size=8)
    layout = refill.Layout(rows=2, width=2, groups=2, members=2, batch=2)
    monkeypatch.setattr("mmpo_jax.generation.responses.choose_layout", lambda *_: layout)
    np.testing.assert_array_equal(draw(start, records, one_device(), 1.0, names), wanted)
    monkeypatch.undo()
    mesh = meshes.mesh_of(2, 2, 2)
    start = start.placed(mesh)
    found = draw(start, records[::-1], mesh, 1.0, names[::-1], batch_size=4)
    turned = np.concatenate(np.split(found, 8)[::-1])
    np.testing.assert_array_equal(turned, wanted)
