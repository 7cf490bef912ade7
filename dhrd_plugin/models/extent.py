"""Where the real tokens of a batch lie, as the host knows it, so that a step does not wait for a GPU to say it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dhrd_plugin.losses import IGNORE_INDEX

# Of one row: its first column, one past its last input column, one past its last column, supervised tokens.
Span = tuple[int, int, int, int]


@dataclass(frozen=True)
class Extent:
    """What the network must know of a batch before it runs it.

    Attributes:
        first: the first column in which any row has a real token.
        last: one past the last such column.
        longest: real tokens of the longest row.
        tokens: real tokens of all rows.
        targets: supervised tokens of all rows.
        from_left: whether every row begins at ``first``.
    """

    first: int
    last: int
    longest: int
    tokens: int
    targets: int
    from_left: bool

    @classmethod
    def of(cls, spans: Sequence[Span], reason: bool) -> 'Extent':
        """From the ``spans`` of a collator's batch; of the input alone where not ``reason``."""
        starts, inputs, ends, targets = zip(*spans)
        ends = ends if reason else inputs
        lengths = [end - start for start, end in zip(starts, ends)]
        first = min(starts)
        return cls(first, max(ends), max(lengths), sum(lengths), sum(targets), max(starts) == first)

    @classmethod
    def read(cls, attention_mask: Tensor, reasoning_labels: Tensor | None = None) -> 'Extent':
        """From a mask and labels [B, S] of any make; waits, once, for the device that they are on."""
        real = attention_mask.bool()
        columns, lengths = real.any(0).int(), real.sum(1)
        first, last = columns.argmax(), len(columns) - columns.flip(0).argmax()
        targets = lengths.new_zeros(())
        if reasoning_labels is not None:
            after = torch.arange(len(columns), device=real.device) > first
            targets = ((reasoning_labels != IGNORE_INDEX) & after).sum()
        from_left = real.index_select(1, first[None]).all()
        facts = torch.stack([first, last, lengths.max(), lengths.sum(), targets, from_left.long()]).tolist()
        return cls(*facts[:5], from_left=bool(facts[5]))
