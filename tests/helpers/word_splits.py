"""How tokenizers split text before they merge: those whose tokens depend on what stands beside."""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

QWEN2_WORDS = (  # the published expression that splits text before merging
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level() -> pre_tokenizers.PreTokenizer:
    """As Qwen2's."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def metaspace() -> pre_tokenizers.PreTokenizer:
    """As InternLM's: a space in front of the text; lines' ends are tokens of their own."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
