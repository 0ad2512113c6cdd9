"""transformers reads what is saved here, and what it saves in shards is read."""

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
import transformers

from mmpo_jax.models.huggingface import flatten, load_params, save_model
from mmpo_jax.models.safetensors_files import SINGLE_FILE

pytestmark = pytest.mark.parity

KINDS = [("float32", 10**9), ("float32", 20_000), ("bfloat16", 10**9), ("float16", 20_000)]


@pytest.mark.parametrize(("dtype", "size"), KINDS)
def test_there_and_back(tiny_folder, tiny_model, tmp_path, dtype, size):
    model, params = tiny_model
    save_model(tmp_path / "ours", model, params, tiny_folder, dtype=dtype, max_shard_bytes=size)
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.dtype == theirs.config.dtype == getattr(torch, dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert (tmp_path / "theirs" / SINGLE_FILE).exists() == (size > 10**6)
    again = flatten(load_params(tmp_path / "theirs", model))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(again[path], leaf.astype(dtype), err_msg=path)
