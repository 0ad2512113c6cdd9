"""transformers reads what is saved here, whole, and what it saves itself is read."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from helpers import checks, families  # noqa: E402

from mmpo_jax.checkpoints.cards import ModelCard  # noqa: E402
from mmpo_jax.checkpoints.huggingface import load_params, save_model  # noqa: E402
from mmpo_jax.checkpoints.safetensors_files import SINGLE_FILE  # noqa: E402
from mmpo_jax.core.trees import flatten  # noqa: E402
from mmpo_jax.data.processor import Processor  # noqa: E402
from mmpo_jax.data.tokenization import tokenize  # noqa: E402

pytestmark = pytest.mark.parity

KINDS = {
    "single": (False, "float32", 10**9),
    "sharded": (False, "bfloat16", 20_000),
    "tied": (True, "float16", 10**9),
    "tied-sharded": (True, "float32", 20_000),
}
"""Whether the head is tied, dtype, bytes of a file."""


def same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_there_and_back(family_case, tmp_path, family, kind):
    tied, dtype, size = KINDS[kind]
    case = family_case(family, tied)
    assert case.model.config.decoder.tie_word_embeddings == tied
    ours, theirs, again = (tmp_path / name for name in ("ours", "theirs", "again"))
    wanted = {"dtype": dtype, "max_shard_bytes": size}
    save_model(ours, case.model, case.params, case.folder, **wanted)
    loaded, info = type(case.theirs).from_pretrained(ours, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == loaded.config.dtype == getattr(torch, dtype)
    expected = {name: x.to(loaded.dtype) for name, x in case.theirs.state_dict().items()}
    same_bits(loaded.state_dict(), expected)

    loaded.save_pretrained(theirs, max_shard_size=size)
    assert (theirs / SINGLE_FILE).exists() == (size > 10**6)
    params = load_params(theirs, case.model)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(case.params)[path].astype(dtype), err_msg=path)
    save_model(again, case.model, params, ours, max_shard_bytes=size)
    names = {file.name for file in ours.iterdir()}
    assert names == {file.name for file in again.iterdir()}
    for name in names:
        assert (again / name).read_bytes() == (ours / name).read_bytes(), name


CLIP = {
    "patch_size": 14,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}
AUDIO = {"feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}}
UNIFIED_AUDIO = {
    "feature_extractor": {"feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor"}
}
PROCESSORS = {
    "llava": ("LlavaProcessor", CLIP),
    "llava_next": ("LlavaNextProcessor", CLIP),
    "llava_onevision": ("LlavaOnevisionProcessor", {"num_image_tokens": 4}),
    "internvl": ("InternVLProcessor", {"image_seq_length": 1}),
    "idefics3": ("Idefics3Processor", {"image_seq_len": 1}),
    "smolvlm": ("SmolVLMProcessor", {"image_seq_len": 1}),
    "mistral3": (
        "PixtralProcessor",
        {"patch_size": 7, "spatial_merge_size": 2, "image_token": "[IMG]"},
    ),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", {}),
    "qwen3_vl": ("Qwen3VLProcessor", {}),
    "qwen3_vl_moe": ("Qwen3VLProcessor", {}),
    "qwen3_5": ("Qwen3VLProcessor", {}),
    "qwen3_5_moe": ("Qwen3VLProcessor", {}),
    **dict.fromkeys(families.GEMMA4, ("Gemma4Processor", AUDIO)),
    "gemma4_unified": ("Gemma4UnifiedProcessor", UNIFIED_AUDIO),
}
"""Of transformers, with what their files say beside the processors of images and videos."""
VIDEO_PROCESSORS = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "qwen3_vl_moe": "Qwen3VLVideoProcessor",
    "qwen3_5": "Qwen3VLVideoProcessor",
    "qwen3_5_moe": "Qwen3VLVideoProcessor",
    **dict.fromkeys(families.GEMMA4, "Gemma4VideoProcessor"),
    "gemma4_unified": "Gemma4UnifiedVideoProcessor",
}
WITH_TORCHVISION = importlib.util.find_spec("torchvision") is not None
OLD, NEW = "transformers 4", "transformers 5"


@pytest.fixture(params=[OLD, NEW])
def version(request):
    return request.param


@pytest.fixture
def source(family_case, version, tmp_path):
    """family -> its checkpoint, the files beside the weights as a version of transformers writes
    them: settings of images and videos in files of their own, or inside of the processor's."""

    def source(family):
        case = family_case(family)
        folder = tmp_path / "source"
        save_model(folder, case.model, case.params, case.folder)
        if family in PROCESSORS:
            kind, settings = PROCESSORS[family]
            settings = settings | {"processor_class": kind}
            parts = {"image_processor": "preprocessor_config.json"}
            if family in VIDEO_PROCESSORS:
                parts["video_processor"] = "video_preprocessor_config.json"
                path = folder / parts["video_processor"]
                video = {"video_processor_type": VIDEO_PROCESSORS[family]}
                checks.write_json(path, json.loads(path.read_text()) | video)
            if version == NEW:
                for key, name in parts.items():
                    settings[key] = json.loads((folder / name).read_text())
                    (folder / name).unlink()
            checks.write_json(folder / "processor_config.json", settings)
        return dataclasses.replace(case, folder=folder)

    return source


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_lies_beside_the_weights_is_carried(source, tmp_path, family):
    case, saved = source(family), tmp_path / "saved"
    card = ModelCard("base", False, "text-generation", "dpo", {}, {}, {})
    save_model(saved, case.model, case.params, case.folder, card=card)
    for file in case.folder.iterdir():
        assert (saved / file.name).read_bytes() == file.read_bytes(), file.name
    assert {"generation_config.json", "chat_template.jinja"} <= {f.name for f in saved.iterdir()}
    assert "base" in (saved / "README.md").read_text()
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    ours = Processor(saved, case.model.config)
    assert ours.fingerprints() == case.processor.fingerprints()
    assert theirs.get_vocab() == case.processor.tokenizer.get_vocab()
    assert theirs.chat_template == case.processor.tokenizer.chat_template
    if family in PROCESSORS and (WITH_TORCHVISION or family != "gemma4_unified"):
        images = transformers.AutoImageProcessor.from_pretrained(saved, backend="pil")
        assert images.to_dict() == case.processor.image_processor.to_dict()
        assert json.loads((saved / "preprocessor_config.json").read_text())
    if family in VIDEO_PROCESSORS:
        assert json.loads((saved / "video_preprocessor_config.json").read_text())


@pytest.mark.parametrize("family", PROCESSORS)
def test_the_processor_of_transformers(source, tmp_path, family):
    """It loads from the saved folder, and makes of a prompt what ours does; where it needs
    torchvision and there is none, it says so."""
    case, saved = source(family), tmp_path / "saved"
    save_model(saved, case.model, case.params, case.folder)
    if family in (*VIDEO_PROCESSORS, "mistral3") and not WITH_TORCHVISION:
        with pytest.raises((ImportError, ValueError), match=r"[Tt]orchvision"):
            transformers.AutoProcessor.from_pretrained(saved)
        return
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="its processor needs num2words")
    theirs = transformers.AutoProcessor.from_pretrained(saved)
    assert type(theirs).__name__ == PROCESSORS[family][0]
    record = families.records(family)[0]
    text, images = checks.rendered(case, record), checks.load(record.images)
    expected = theirs(images=images, text=text, add_special_tokens=False)["input_ids"]
    tokens = tokenize(record, Processor(saved, case.model.config), 2**20, 2**20)
    assert [tokens.prompt_ids.tolist()] == [list(ids) for ids in expected]
