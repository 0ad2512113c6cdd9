"""Tensors that other tools leave in checkpoints: what they look like, and the way out."""

from __future__ import annotations

import re

KNOWN = (
    (
        r"v_head\.",
        "the value head of a PPO model of TRL; save the model inside of it: "
        "`model.pretrained_model.save_pretrained(...)`",
    ),
    (
        r"(score|classifier|reward_head|rm_head)\.",
        "the head of a reward or classification model, of which config.json says nothing. A reward "
        'model\'s config has `"reward_head": {"type": "linear"}` for score.weight, '
        "and the type two_layer for rm_head.dense and rm_head.out_proj; to sample or to train a "
        "policy take the checkpoint that it was made of",
    ),
    (
        r"module\.",
        "the prefix of DistributedDataParallel or DeepSpeed; save what they wrap: "
        "`model.module.save_pretrained(...)`",
    ),
    (
        r"_orig_mod\.",
        "the prefix of torch.compile; save what it wraps: `model._orig_mod.save_pretrained(...)`",
    ),
    (
        r"(base_model\.model\.|.*\.(base_layer|lora_[AB])\.)",
        "a PEFT model that is not merged; save `model.merge_and_unload()`, or the adapter alone "
        "with `model.save_pretrained(...)`",
    ),
    (
        r".*\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|weight_scale\w*)",
        "quantised weights; load them with transformers and save `model.dequantize()`",
    ),
)
"""(regular expression that a tensor's name begins with, what to tell)."""


def explain(name: str) -> str:
    """What an unexpected tensor looks like, to be put behind its name; empty where unknown."""
    return next((f": {told}" for pattern, told in KNOWN if re.match(pattern, name)), "")
