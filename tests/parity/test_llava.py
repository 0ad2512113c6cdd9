"""The model against transformers' LLaVA: logits, greedy decoding, checkpoint folders."""

import dataclasses
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from helpers import tiny
from helpers.sampling import sample

from mmpo_jax.checkpoints.folders import BUILTIN
from mmpo_jax.checkpoints.huggingface import load_model, save_model
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, Record, Turn
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.generation.sampler import sample_keys
from mmpo_jax.picture_world.language import CAPTION_PROMPTS
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.sampling import Decoding

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402
from helpers import checks  # noqa: E402
from transformers import LlavaForConditionalGeneration  # noqa: E402

pytestmark = pytest.mark.parity

LAYERS_LIST = {"vision_feature_layer": [-3, 1, -1], "vision_feature_select_strategy": "full"}
CASES = {
    "grouped-queries": tiny.make_config(),
    "tied-full-last-layer": tiny.make_config(
        text={"num_key_value_heads": 4},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    ),
    "layer-list-biases": tiny.make_config(
        {"image_size": 24, "num_hidden_layers": 4},
        {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1},
        **LAYERS_LIST,
    ),
    "head-dim-one-key-head": tiny.make_config(
        {"hidden_act": "gelu", "patch_size": 4},
        {"head_dim": 16, "num_key_value_heads": 1, "rope_theta": 500_000.0},
        multimodal_projector_bias=False,
    ),
    "wide-patches-a-layer-twice": tiny.make_config(
        {"image_size": 28, "patch_size": 14, "hidden_size": 24, "num_attention_heads": 3},
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
        vision_feature_layer=[-1, -1],
    ),
    "siglip-first-patch-dropped": tiny.make_config(
        {"vision_use_head": False}, tower=transformers.SiglipVisionConfig
    ),
    "deep-tied": tiny.make_config(
        {"num_hidden_layers": 1, "layer_norm_eps": 1e-3},
        {"num_hidden_layers": 5, "rms_norm_eps": 1e-2, "hidden_act": "gelu_pytorch_tanh"},
        tie_word_embeddings=True,
        vision_feature_layer=[0, -1],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("case") / request.param
    return make_case(tiny.make_folder(folder, CASES[request.param]))


@pytest.fixture(scope="module")
def plain_case(tiny_folder):
    return make_case(tiny_folder)


def make_case(folder):
    model, params = load_model(folder)
    processor = Processor(folder, model.config)
    return checks.Case(folder, load_theirs(folder), model, params, processor)


@pytest.fixture(scope="module")
def inputs(case):
    processor = transformers.CLIPImageProcessorPil.from_pretrained(case.folder)

    def inputs(record, ids):
        if not record.images:
            return {}
        return {
            "pixel_values": processor(checks.load(record.images), return_tensors="pt").pixel_values
        }

    return inputs


def load_theirs(folder):
    theirs, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return theirs.eval()


@torch.no_grad()
def their_logits(theirs, ids, pixels):
    return theirs(
        input_ids=torch.tensor(ids[None]).long(), pixel_values=torch.tensor(pixels)
    ).logits[0]


@torch.no_grad()
def their_greedy(theirs, ids, pixels, length, eos_ids):
    ids = torch.tensor(ids[None]).long()
    out = theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.tensor(pixels),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=list(eos_ids),
        pad_token_id=tiny.PAD_ID,
    )
    return out[0, ids.shape[1] :].numpy()


def our_greedy(model, params, batch, length, eos_ids):
    keys = sample_keys(0, 0, np.arange(len(batch.prompt_ids)), 1)
    decoding = Decoding(num_samples=1, temperature=0, max_new_tokens=length)
    tokens = sample(
        model, params, batch, keys, decoding=decoding, eos_ids=eos_ids, pad_id=tiny.PAD_ID
    )
    return np.asarray(tokens)[:, 0]


def test_logits(case, inputs):
    checks.check_logits(case, checks.RECORDS, inputs)


def test_greedy_decoding(case, inputs):
    checks.check_greedy(case, checks.RECORDS, inputs)


def test_greedy_decoding_stops_at_any_eos(plain_case):
    model, params, theirs = plain_case.model, plain_case.params, plain_case.theirs
    shortest = 2 + model.config.num_image_tokens + 1
    prompts = shortest + 5, shortest, shortest + 2
    batch = tiny.random_batch(model.config, prompts, [[1]] * 3)
    free = our_greedy(model, params, batch, 12, eos_ids=(tiny.EOS_ID,))
    # Tokens that row 0 says fourth and row 1 says second end a response from now on.
    eos_ids = (tiny.EOS_ID, int(free[0, 3]), int(free[1, 1]))
    tokens = our_greedy(model, params, batch, 12, eos_ids=eos_ids)
    lengths = []
    for row in range(len(tokens)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        expected = their_greedy(theirs, prompt, batch.pixel_values[row], 12, eos_ids)
        np.testing.assert_array_equal(tokens[row, : len(expected)], expected)
        assert np.all(tokens[row, len(expected) :] == tiny.PAD_ID)
        lengths.append(len(expected))
    assert lengths[0] <= 4
    assert lengths[1] <= 2


def test_folder_round_trip_keeps_every_bit(case, tmp_path):
    folder, model, params = case.folder, case.model, case.params
    save_model(tmp_path / "out", model, params, folder)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert_same_tensors(tmp_path / "out", folder)
    load_theirs(tmp_path / "out")


def test_transformers_own_files_load(case, tmp_path):
    folder, model, params = case.folder, case.model, case.params
    case.theirs.save_pretrained(tmp_path / "saved")
    _, loaded = load_model(tmp_path / "saved")
    assert_same_params(loaded, params)
    save_model(tmp_path / "out", model, loaded, folder)
    assert_same_tensors(tmp_path / "out", folder)


def assert_same_params(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert actual[path].dtype == leaf.dtype
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)


def assert_same_tensors(actual, expected):
    """Equal dtype, shape and bits under equal names."""
    actual, expected = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (actual, expected)
    )
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(actual[key], tensor), key


# Every spelling transformers has written, from the one `save_model` writes (4.x, llava-hf).
KEY_LAYOUTS = {
    "saved by transformers 4.x": lambda key: key,
    "in memory from 4.52 on": lambda key: (
        "model." + re.sub(r"^language_model\.model\.", "language_model.", key)
    ).replace("model.language_model.lm_head.", "lm_head."),
    "in memory from 5.x on": lambda key: (
        ("model." + re.sub(r"^language_model\.model\.", "language_model.", key))
        .replace("model.language_model.lm_head.", "lm_head.")
        .replace("vision_tower.vision_model.", "vision_tower.")
    ),
    "4.x with a bare vision tower": lambda key: key.replace(
        "vision_tower.vision_model.", "vision_tower."
    ),
}


@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_key_layouts(plain_case, tmp_path, layout):
    folder, params = plain_case.folder, plain_case.params
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    renamed = {KEY_LAYOUTS[layout](key): tensor for key, tensor in tensors.items()}
    shutil.copy(folder / "config.json", tmp_path)
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors")
    assert_same_params(load_model(tmp_path)[1], params)


def test_state_dict_keys_load(plain_case, tmp_path):
    folder, params = plain_case.folder, plain_case.params
    shutil.copy(folder / "config.json", tmp_path)
    tensors = {key: tensor.contiguous() for key, tensor in plain_case.theirs.state_dict().items()}
    assert any(key.startswith("model.language_model.layers.") for key in tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert_same_params(load_model(tmp_path)[1], params)


def test_sharded_files_load(plain_case, tmp_path):
    params, theirs = plain_case.params, plain_case.theirs
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_params(load_model(tmp_path)[1], params)


@pytest.mark.parametrize(
    ("theirs_dtype", "ours_dtype"),
    [(torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)],
)
def test_half_precision_files(plain_case, tmp_path, theirs_dtype, ours_dtype):
    folder, params = plain_case.folder, plain_case.params
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    half = {key: tensor.to(theirs_dtype) for key, tensor in tensors.items()}
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    safetensors.torch.save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    model, loaded = load_model(tmp_path)
    assert_same_params(loaded, jax.tree.map(lambda leaf: leaf.astype(ours_dtype), params))
    save_model(tmp_path / "out", model, loaded, tmp_path)
    assert_same_tensors(tmp_path / "out", tmp_path)


SHIPPED = BUILTIN["builtin:picture_world"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHIPPED / "model.safetensors").is_file(), reason=f"{SHIPPED} has no weights yet"
)
def test_shipped_checkpoint():
    model, params = load_model(SHIPPED)
    theirs = load_theirs(SHIPPED)
    processor = Processor(SHIPPED, model.config)
    records = [
        Record(
            id=str(i),
            images=(ImageRef(str(i), png_bytes(sample_scene("test", 0, i))),),
            prompt=(Turn("user", CAPTION_PROMPTS[i % len(CAPTION_PROMPTS)]),),
            responses=(),
        )
        for i in range(20)
    ]
    rows = [tokenize(record, processor, 256, 1) for record in records]
    batch = pad_batch(
        rows,
        processor,
        rows=20,
        prompt_sizes=(max(len(row.prompt_ids) for row in rows),),
        response_sizes=(1,),
    )
    eos_ids = (processor.eos_id,)
    tokens = our_greedy(model, params, batch, 48, eos_ids)
    responses = dataclasses.replace(
        batch,
        response_ids=tokens[:, None],
        response_mask=np.ones_like(tokens[:, None], bool),
    )
    logits = np.asarray(checks.response_logits(model, params, responses))[:, 0]
    ended = 0
    for row, prompt in enumerate(rows):
        pixels = batch.pixel_values[row]
        expected = their_greedy(theirs, prompt.prompt_ids, pixels, 48, eos_ids)
        np.testing.assert_array_equal(tokens[row, : len(expected)], expected)
        assert np.all(tokens[row, len(expected) :] == processor.pad_id)
        text = np.concatenate([prompt.prompt_ids, expected])
        start = len(prompt.prompt_ids) - 1
        np.testing.assert_allclose(
            logits[row, : len(expected)],
            their_logits(theirs, text, pixels)[start:-1].numpy(),
            rtol=0,
            atol=1e-4,
        )
        ended += expected[-1] == processor.eos_id
    assert ended == 20  # a caption that never ends is no caption
