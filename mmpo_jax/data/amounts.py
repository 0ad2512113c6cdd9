"""How much of the data a batch holds, for rates and counts of operations."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from mmpo_jax.data.tokenization import TokenizedRecord


@dataclasses.dataclass(frozen=True)
class Amounts:
    """What of the data one or several batches hold, over all processes; padding is left out, and
    what responses share counts once."""

    rows: int = 0
    responses: int = 0
    pairs: int = 0
    """Preference pairs; 0 where objectives compare none."""
    tokens: int = 0
    """Tokens of prompts and responses, in all contexts of the rows."""
    computed: int = 0
    """Tokens that the decoder computes, padding included."""
    targets: int = 0
    """Tokens that a loss counts."""
    seen: int = 0
    """Pairs of a query and a key that it sees."""
    slots: tuple[int, ...] = ()
    """Slots of the pictures of every row and context that has some."""

    @classmethod
    def of(
        cls, records: Sequence[TokenizedRecord], rows: int, pairs: int, computed: int
    ) -> Amounts:
        """What a batch holds.

        Args:
          records: in it, all contexts of its rows.
          rows: how many of them are rows.
          pairs: preference pairs.
          computed: tokens that the decoder computes.
        """
        prompts = [len(record.prompt_ids) for record in records]
        lengths = [[len(response.ids) for response in record.responses] for record in records]
        return cls(
            rows=rows,
            responses=sum(map(len, lengths)),
            pairs=pairs,
            tokens=sum(prompts) + sum(map(sum, lengths)),
            computed=computed,
            targets=sum(int(r.loss_mask.sum()) for record in records for r in record.responses),
            seen=sum(map(seen_pairs, prompts, lengths)),
            slots=tuple(record.num_slots for record in records if record.num_slots),
        )

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(
            *(
                getattr(self, field.name) + getattr(other, field.name)
                for field in dataclasses.fields(self)
            )
        )


def seen_pairs(prompt: int, responses: Sequence[int]) -> int:
    """Query-key pairs of a row in which the query sees the key: causal in the prompt; every
    response token sees the whole prompt and its own response so far.

    Args:
      prompt: its length.
      responses: lengths of all responses.
    """
    own = sum(length * prompt + length * (length + 1) // 2 for length in responses)
    return prompt * (prompt + 1) // 2 + own


def preference_pairs(ranks: Sequence[float]) -> int:
    """How many pairs of responses have different ranks."""
    return sum(first != second for first, second in itertools.combinations(ranks, 2))
