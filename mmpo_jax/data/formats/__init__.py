"""Conventions for rows, one a file, and the choice between them."""

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.formats import (
    alpaca,
    llama_factory,
    mm_rlhf,
    ms_swift,
    record,
    reward_benchmarks,
    rlaif_v,
    trl,
)
from mmpo_jax.data.formats.format import Format
from mmpo_jax.data.rows import Row

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        record.FORMAT,
        mm_rlhf.RANKING,
        mm_rlhf.PAIRS,
        reward_benchmarks.VL_REWARDBENCH,
        reward_benchmarks.MULTIMODAL_REWARDBENCH,
        rlaif_v.RLAIF_V,
        rlaif_v.RLHF_V,
        llama_factory.FORMAT,
        ms_swift.FORMAT,
        alpaca.FORMAT,
        trl.FORMAT,
    )
}
"""Name -> format; a row is read by the first that claims its columns."""


def register_format(format: Format) -> None:
    """Adds a convention, which is asked for its columns before the others are."""
    others = {name: other for name, other in FORMATS.items() if name != format.name}
    FORMATS.clear()
    FORMATS.update({format.name: format}, **others)


def format_called(name: str) -> Format:
    """The format of a name.

    Raises:
      DataError: nothing that is imported adds one of that name.
    """
    if name not in FORMATS:
        raise DataError(
            f"format {name}: not known here; known: auto, {', '.join(FORMATS)}; others are there "
            "once what adds them with register_format is imported"
        )
    return FORMATS[name]


def choose_format(row: Row) -> Format:
    """The format whose columns a row has; TRL's where there is none, which says what is missing."""
    return next((format for format in FORMATS.values() if format.claims(row)), trl.FORMAT)
