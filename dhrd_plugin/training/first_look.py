"""A look at the rows before the first step: what they are, and that none is too long."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.data.lengths import (
    describe_changed,
    describe_leaks,
    describe_lengths,
    merge,
    shares,
    summarise,
    survey,
)
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.triplet import counted_as
from dhrd_plugin.data.truncate import fit
from dhrd_plugin.errors import UserError
from dhrd_plugin.streams.rows import StreamRows
from dhrd_plugin.streams.stream import TripletStream
from dhrd_plugin.training.builders import build_collator
from dhrd_plugin.training.config import Config
from dhrd_plugin.training.labels import told_summary

MOST = 100_000  # rows of a loader that are looked at
BATCH = 512  # rows at a time


def first_look(
    config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, streams: Mapping[str, Sequence[TripletStream]]
) -> list[str]:
    """What to say of the training rows; of each loader the first ``MOST`` rows that are here are looked at.

    Args:
        config: of the run.
        task: likewise.
        tokenizer: likewise.
        streams: the rows of each loader, by its key.

    Returns:
        Lines: rows, labels and their share, lengths, what is cut, rationales that state the label or are another row's;
        none where the training rows are not here yet.

    Raises:
        UserError: an input, of training or of evaluation, is longer than ``max_seq_len`` and cannot be cut.
    """
    lines: list[str] = []
    for key, found in streams.items():
        training = key == 'train_loader'
        here = [stream for stream in found if stream.remote is None or not training]
        if here:
            collator = build_collator(config, task, tokenizer, reasoning=training)  # evaluation reads no rationale
            collator.max_seq_len = None
            told = _look(StreamRows(here), key, collator, config.max_seq_len)
            lines += [*told, *filter(None, map(_changed, here))] if training else []
    return lines


def _changed(stream: TripletStream) -> str:
    with suppress(TypeError, LookupError, AttributeError):  # a summary may hold anything
        told = describe_changed(told_summary(stream))
        return told and f'warning: {told}'
    return ''


def _look(rows: StreamRows, key: str, collator: TripletCollator, limit: int) -> list[str]:
    labels = Counter(dict.fromkeys(collator.class_index, 0))
    findings, first, too_long, with_rationale = [], None, 0, 0
    for batch in _batches(rows):
        labels.update(name for row in batch for name in counted_as(row))
        for row in batch:
            collator.target(row)  # refuses a label of the other kind
        with_rationale += sum(row.get('rationale') is not None for row in batch)
        findings.append(survey(batch, collator))
        if max(findings[-1].input) > limit:
            for row, length in _too_long(batch, collator.tokenizer, limit):
                too_long, first = too_long + 1, first or (row['id'], length)
    count = min(len(rows), MOST)
    if first is not None:
        raise UserError(
            f'{key}: row {first[0]}: input_text: found {first[1]:,} tokens; expected at most max_seq_len={limit}, '
            f'which {too_long:,} of {count:,} inputs are longer than (raise it, or let a field of the prompt be cut: '
            'truncate: FIELD in the task)'
        )
    summary = summarise(merge(findings), 'the run', limit)
    some = f' of {len(rows):,}, the first' if count < len(rows) else ''
    head = f'{key}: {count:,} rows{some}, {with_rationale:,} with a rationale: {shares(labels, count)}'
    leaks = describe_leaks(summary)
    return [head, '; '.join(describe_lengths(summary)), *([f'warning: {leaks}'] if leaks else [])]


def _batches(rows: StreamRows) -> Iterator[list[Any]]:
    read = (rows[index] for index in range(min(len(rows), MOST)))
    while batch := list(islice(read, BATCH)):
        yield batch


def _too_long(batch: Sequence[Any], tokenizer: Any, limit: int) -> Iterator[tuple[Any, int]]:
    """The rows whose input is too long even when it is cut, and its length in tokens."""
    texts = [fit(tokenizer, row['input_text'], row.get('cuttable'), limit) for row in batch]
    for row, ids in zip(batch, tokenizer(texts, verbose=False)['input_ids'], strict=True):
        if len(ids) > limit:
            yield row, len(ids)
