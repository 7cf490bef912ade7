"""What to know of triplets before a long run: lengths, cuts, rationales that state the label."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dhrd_plugin.data.leaks import restated
from dhrd_plugin.data.triplet import Triplet, rationales_of, words_of

BATCH = 512  # triplets that are tokenised at a time
MAX_IDS = 100  # of rows whose rationale states the label, in a summary


@dataclass
class Findings:
    """What a survey of some triplets found."""

    input: Counter[int] = field(default_factory=Counter)  # how many inputs have which length
    sequence: Counter[int] = field(default_factory=Counter)  # the same for input, rationale and answer together
    cuttable: Counter[int] = field(default_factory=Counter)  # of those inputs that may be cut
    cut: Counter[int] = field(default_factory=Counter)  # of those sequences whose rationale has been cut already
    leaks: list[str] = field(default_factory=list)  # ids of the rows whose rationale states their label or answer


def survey(triplets: list[Triplet], tokenizer: Any = None) -> Findings:
    """Count lengths and leaks; where a row has several rationales, the longest counts.

    Lengths are in tokens, markers included, as the model will see them; without a tokenizer in words. ``tokenizer`` is
    the name of one, or a :class:`~dhrd_plugin.TripletCollator` without ``max_seq_len``.
    """
    found = Findings(leaks=[row['id'] for row in triplets if _leaks(row)])
    lengths = _tokens(triplets, tokenizer) if tokenizer else _words(triplets)
    for row, (sequence, part, cut) in zip(triplets, lengths, strict=True):
        found.sequence[sequence] += 1
        found.cut[sequence] += cut
        found.input[part] += 1
        found.cuttable[part] += row.get('cuttable') is not None
    return found


def merge(parts: Iterable[Findings]) -> Findings:
    """Merge the findings of several surveys, in their order."""
    merged = Findings()
    for part in parts:
        merged.input.update(part.input)
        merged.sequence.update(part.sequence)
        merged.cuttable.update(part.cuttable)
        merged.cut.update(part.cut)
        merged.leaks += part.leaks
    return merged


def summarise(found: Findings, tokenizer: str | None = None, max_seq_len: int | None = None) -> dict[str, Any]:
    """Findings as plain data, for ``triplets.json``.

    ``lengths`` holds those that 50, 95 and 100 % of the rows do not exceed. With a ``max_seq_len`` (of the training,
    in tokens) ``cut`` counts the rows whose rationale will be cut or left out, ``inputs_cut`` those whose input is
    longer and may be cut (``truncate``), and ``inputs_too_long`` those whose input alone is longer, which training
    refuses.
    """
    summary: dict[str, Any] = {
        'lengths': {
            'unit': 'tokens' if tokenizer else 'words',
            'tokenizer': tokenizer,
            'input': _percentiles(found.input),
            'sequence': _percentiles(found.sequence),
        },
        'states_label': {'rows': len(found.leaks), 'ids': found.leaks[:MAX_IDS]},
    }
    if max_seq_len:
        longer, inputs_cut = _longer(found.input, max_seq_len), _longer(found.cuttable, max_seq_len)
        cut = _longer(found.sequence, max_seq_len) - longer + _longer(found.cut, 0) - _longer(found.cut, max_seq_len)
        summary |= {'max_seq_len': max_seq_len, 'cut': cut, 'inputs_cut': inputs_cut}
        summary['inputs_too_long'] = longer - inputs_cut
    return summary


def describe(place: object, summary: Mapping[str, Any]) -> Iterator[str]:
    """A set of shards in lines for people.

    Args:
        place: where it is.
        summary: ``triplets.json``, perhaps with ``hashes`` (checked) and ``several`` (rows with more than one
            rationale). What it lacks gets no line.
    """
    rows, count, without = summary['rows'], summary['shard_count'], summary['without_rationale']
    speed = f', {rows / max(summary["seconds"], 1e-3):,.0f} rows/s' if 'seconds' in summary else ''
    yield f'{place}: {rows:,} rows in {count:,} shard{"s" * (count > 1)}, {summary["bytes"]:,} bytes{speed}'
    if 'hashes' in summary:
        yield f'  hashes checked: {", ".join(sorted(summary["hashes"])) or "none: the index holds none"}'
    yield f'  labels: {shares(summary["labels"], rows)}'
    several = f' ({summary["several"]:,} with several)' if 'several' in summary else ''
    yield f'  rationales: {rows - without:,} rows with{several}, {without:,} without'
    if told := summary.get('with_probabilities'):
        yield f'  probabilities: {told:,} rows'
    if joined := summary.get('joined'):
        yield (
            f'  joined: {joined["joined"]:,} of {joined["rationales"]:,} rationales, '
            f'{joined["unmatched"]:,} match no row, {joined["replaced"]:,} replace one of the row'
        )
        if changed := describe_changed(summary):
            yield f'  warning: {changed}'
    yield from (f'  {line}' for line in describe_lengths(summary))
    if summary.get('set_aside'):
        yield f'  set aside: {summary["set_aside"]:,} bad rows'
    if leaks := describe_leaks(summary):
        yield f'  warning: {leaks}'


def shares(labels: Mapping[str, int], rows: int, most: int = 20) -> str:
    """``yes 30 (75%), no 10 (25%)``: how many of the rows have which label, the first ``most`` of them."""
    named = [f'{name or "(none)"} {count:,} ({count / max(1, rows):.0%})' for name, count in labels.items()]
    return ', '.join(named[:most]) + (f' and {len(named) - most:,} more' if len(named) > most else '')


def describe_lengths(summary: Mapping[str, Any]) -> Iterator[str]:
    """The lengths of :func:`summarise`, and what is cut, in lines for people."""
    for part in ('input', 'sequence'):
        marks = ', '.join(f'{length:,} at {mark}' for mark, length in summary['lengths'][part].items())
        yield f'{summary["lengths"]["unit"]} of the {part}: {marks}'
    if 'max_seq_len' in summary:
        inputs_cut = f'{summary["inputs_cut"]:,} inputs cut, ' if summary.get('inputs_cut') else ''
        yield (
            f'at {summary["max_seq_len"]:,} tokens: {inputs_cut}{summary["cut"]:,} rationales cut, '
            f'{summary["inputs_too_long"]:,} inputs too long, which training refuses'
        )


def describe_leaks(summary: Mapping[str, Any]) -> str:
    """Which rationales state the label; empty where none does."""
    found = summary['states_label']
    some = ', '.join(found['ids'][:10])
    more = ', ...' * (found['rows'] > 10)
    return f'the rationale states the label in {found["rows"]:,} rows: {some}{more}' if found['rows'] else ''


def describe_changed(summary: Mapping[str, Any]) -> str:
    """How many rationales that were joined are another text's or answer's, as far as they tell; empty without any."""
    joined = summary.get('joined') or {}
    changed = joined.get('changed')  # a summary of before does not say
    told = f'{changed} of {joined.get("joined")} rationales were written for another text or answer than their row has'
    return f'{told}; are these the rows that they were written for?' if changed else ''


@lru_cache(maxsize=1)
def load_collator(tokenizer: str) -> Any:
    """Load what training turns triplets into tokens with, once in each process."""
    from dhrd_plugin.data.collator import TripletCollator
    from dhrd_plugin.models.build import build_tokenizer

    return TripletCollator(build_tokenizer(tokenizer), label_names=[])


def _percentiles(lengths: Counter[int]) -> dict[str, int]:
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


def _leaks(row: Triplet) -> bool:
    return any(restated(text, words_of(row)) for text in rationales_of(row))


def _words(triplets: list[Triplet]) -> Iterator[tuple[int, int, bool]]:
    for row in triplets:
        part = len(row['input_text'].split())
        reasoning = [len(text.split()) for text in rationales_of(row)]
        answer = 0 if row['rationale'] is None else len(row['answer'].split())
        yield part + max(reasoning, default=0) + answer, part, False


def _tokens(triplets: list[Triplet], tokenizer: Any) -> Iterator[tuple[int, int, bool]]:
    collator = load_collator(tokenizer) if isinstance(tokenizer, str) else tokenizer
    longest = [{**row, 'rationale': max(rationales_of(row), key=len, default=row['rationale'])} for row in triplets]
    for start in range(0, len(longest), BATCH):
        for row in collator.encode(longest[start : start + BATCH]):
            yield len(row.input_ids), row.input_length, row.cut > 0
