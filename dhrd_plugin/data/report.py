"""What there is to know of triplets before a long run: lengths, cuts, rationales that tell the label."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dhrd_plugin.data.teacher import restated
from dhrd_plugin.data.triplets import Triplet

__all__ = ['Look', 'Seen', 'collator', 'merge', 'percentiles', 'report']

BATCH = 512
SHOWN = 100  # ids of leaking rows that a summary lists


@dataclass
class Seen:
    """What one look at some triplets found.

    Attributes:
        input: how many inputs have which length.
        sequence: the same of input, rationale and answer together.
        leaks: (id, word) of each row whose rationale states its label or answer.
    """

    input: Counter[int] = field(default_factory=Counter)
    sequence: Counter[int] = field(default_factory=Counter)
    leaks: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Look:
    """Looks at triplets; small and without state, so that any process can do it.

    Args:
        tokenizer (str, optional): lengths in tokens of this one, markers included, as the model will
            see them; without one, in words between white space. Default: None.
    """

    tokenizer: str | None = None

    def __call__(self, triplets: list[Triplet]) -> Seen:
        """What there is to see; of several rationales to a row the longest counts."""
        lengths = _words(triplets) if self.tokenizer is None else _tokens(triplets, self.tokenizer)
        seen = Seen()
        for whole, part in lengths:
            seen.sequence[whole] += 1
            seen.input[part] += 1
        seen.leaks = [(row['id'], word) for row in triplets if (word := _leak(row))]
        return seen


def merge(looks: Iterable[Seen]) -> Seen:
    """Several looks as one."""
    merged = Seen()
    for seen in looks:
        merged.input.update(seen.input)
        merged.sequence.update(seen.sequence)
        merged.leaks += seen.leaks
    return merged


def report(seen: Seen, tokenizer: str | None = None, max_seq_len: int | None = None) -> dict[str, Any]:
    """The findings in plain data, for ``triplets.json``.

    ``cut`` counts the rows whose rationale will be cut or left out at ``max_seq_len``; ``inputs_too_long``
    those whose input alone is longer, which training refuses.
    """
    found: dict[str, Any] = {
        'lengths': {
            'unit': 'tokens' if tokenizer else 'words',
            'tokenizer': tokenizer,
            'input': percentiles(seen.input),
            'sequence': percentiles(seen.sequence),
        },
        'states_label': {'rows': len(seen.leaks), 'ids': [ident for ident, _ in seen.leaks[:SHOWN]]},
    }
    if max_seq_len:
        too_long = _longer(seen.input, max_seq_len)
        cut = _longer(seen.sequence, max_seq_len) - too_long
        found |= {'max_seq_len': max_seq_len, 'cut': cut, 'inputs_too_long': too_long}
    return found


def percentiles(lengths: Counter[int]) -> dict[str, int]:
    """The lengths that 50, 95 and 100 % of the rows do not exceed."""
    total, below = sum(lengths.values()), 0
    found: dict[str, int] = {}
    for length in sorted(lengths):
        below += lengths[length]
        for percent in (50, 95, 100):
            if below * 100 >= percent * total:
                found.setdefault(f'{percent}%', length)
    return found


def _longer(lengths: Counter[int], limit: int) -> int:
    return sum(count for length, count in lengths.items() if length > limit)


def _leak(row: Triplet) -> str | None:
    words = [word for word in (row['label'], row['answer']) if word]
    return next((word for text in _texts(row) if (word := restated(text, words))), None)


def _texts(row: Triplet) -> list[str]:
    rationale = row['rationale']
    return rationale if isinstance(rationale, list) else [rationale] if rationale else []


def _words(triplets: list[Triplet]) -> Iterable[tuple[int, int]]:
    for row in triplets:
        part = len(row['input_text'].split())
        reasoning = [len(text.split()) for text in _texts(row)]
        answer = 0 if row['rationale'] is None else len(row['answer'].split())
        yield part + max(reasoning, default=0) + answer, part


def _tokens(triplets: list[Triplet], tokenizer: str) -> Iterable[tuple[int, int]]:
    encoder = collator(tokenizer)
    for start in range(0, len(triplets), BATCH):
        batch = [{**row, 'rationale': max(_texts(row), key=len, default=row['rationale'])}
                 for row in triplets[start : start + BATCH]]  # fmt: skip
        for row in encoder.encode(batch):
            yield len(row.input_ids), row.input_length


@lru_cache(maxsize=1)
def collator(tokenizer: str) -> Any:
    """What training turns triplets into tokens with; loaded once in each process."""
    from dhrd_plugin.data.collation import TripletCollator
    from dhrd_plugin.models.build import build_tokenizer

    return TripletCollator(build_tokenizer(tokenizer), label_names=[])
