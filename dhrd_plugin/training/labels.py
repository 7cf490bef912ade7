"""The labels of the rows that a run reads: those of the shards against the task's, and how many there are of each."""

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from dhrd_plugin.data.labels import labels_of, with_labels
from dhrd_plugin.data.tasks import Task, load_task, with_found_labels
from dhrd_plugin.data.triplet import classes_of, counted_as
from dhrd_plugin.errors import UserError
from dhrd_plugin.ranks import once_a_node
from dhrd_plugin.streams.index import SUMMARY
from dhrd_plugin.streams.remote import join, read
from dhrd_plugin.streams.rows import StreamRows
from dhrd_plugin.streams.settings import WEIGHTS, build_streams
from dhrd_plugin.streams.stream import TripletStream
from dhrd_plugin.training.config import Config


def check_labels(streams: Sequence[TripletStream], task: Task, whole: bool) -> None:
    """Refuse shards with rows of a label that the task does not have, and evaluation sets without any label.

    The summary beside the shards tells; where there is none, the rows themselves, if they are here.

    Args:
        streams: of the shards.
        task: what the labels belong to.
        whole: whether all shards of a remote have been fetched, as those of an evaluation set are.
    """
    for stream in streams:
        labels = told_labels(stream)
        if labels is None and (whole or stream.remote is None):
            rows = StreamRows([stream])
            found = map(rows.__getitem__, range(len(rows)))
            labels = {name for row in found for name in _told(row)}
        if whole and not labels:
            raise UserError(
                f'{stream.key}: {join(stream.place, stream.split)}: found no row with a label to evaluate on'
            )
        foreign = sorted((labels or set()) - set(task.label_names))
        if foreign:
            raise UserError(
                f'{stream.key}: {join(stream.place, stream.split)}: found rows of the label {foreign[0]!r}; '
                f'expected those of the task {task.name}: {", ".join(task.label_names)}'
            )


def _told(row: Mapping[str, Any]) -> list[str]:
    """The classes of a row; the empty one stands for a row that has no probabilities either."""
    return [name for name in counted_as(row) if name or not row.get('probabilities')]


def told_labels(stream: TripletStream) -> set[str] | None:
    """The labels of the rows, as the summary beside the shards says, ``None`` where there is none.

    The empty one stands for rows that have no probabilities either.
    """
    with suppress(TypeError, LookupError, AttributeError):
        told: Any = told_summary(stream)
        named = {str(label) for label, count in told['labels'].items() if count}
        return named if told.get('without_target', 1) else named - {''}


def told_summary(stream: TripletStream) -> Any:
    """What ``triplets.json`` beside the shards says; ``None`` where there is none."""
    with suppress(UserError, ValueError):
        options = stream.downloads if stream.remote else {}
        return json.loads(read(str(join(stream.place, stream.split, SUMMARY)), **options) or b'null')


def count_labels(streams: Sequence[TripletStream], why: str | None = None) -> Counter[str]:
    """How many rows have which label, a row of several with each: by the summaries beside the shards, else by the rows.

    Args:
        streams: of one loader.
        why: the key that wants to know, where the rows are not to be fetched for it. Default: they may be.

    Raises:
        UserError: with ``why``, with which it begins: there is no summary, and the rows are not here.
    """
    counts: Counter[str] = Counter()
    for stream in streams:
        try:
            counts.update({str(label): int(count) for label, count in told_summary(stream)['labels'].items()})
        except (TypeError, ValueError, LookupError, AttributeError):
            if why and stream.remote is not None:
                raise UserError(
                    f'{why}: {join(stream.place, stream.split)} has no summary of its labels; expected {SUMMARY} '
                    'there, as dhrd prepare writes it'
                ) from None
            rows = StreamRows([stream])
            counts.update(name for index in range(len(rows)) for name in classes_of(rows[index]))
    return counts - Counter({'': counts['']})


def find_labels(config: Config, task: Task) -> Task:
    """The task with the labels of the training rows, where it names none. Every rank asks."""
    loader = config.train_loader
    if task.labels:
        return task
    if source := loader.source:
        return once_a_node(lambda: with_labels(task, source, loader.split))
    streams = build_streams(dataclasses.asdict(loader), 'train_loader')
    return once_a_node(lambda: _labels_of_shards(task, streams))


def _labels_of_shards(task: Task, streams: Sequence[TripletStream]) -> Task:
    """Of one set in the order, and with the answers, of the task that it was written for."""
    why = 'task.labels: none are given'
    if len(streams) == 1:
        with suppress(TypeError, LookupError, UserError):
            return with_found_labels(task, load_task(told_summary(streams[0])['task']).labels, why)
    return with_found_labels(task, labels_of(count_labels(streams, why), why), why)


def balanced(streams: Sequence[TripletStream], task: Task) -> list[float]:
    """K weights, N / (K * rows of the class), as scikit-learn's ``balanced``; the mean over the rows is 1.

    Multi-label, how many rows lack the class for one that has it.
    """
    for stream in streams:
        for key in WEIGHTS:
            if hasattr(stream, key):
                raise UserError(
                    f'model.class_weights: balanced: found with {key} of a stream, by which an epoch has other shares '
                    'of the classes than the files; expected a list of numbers'
                )
    counts = count_labels(streams, 'model.class_weights: balanced')
    for name in task.label_names:
        if not counts[name]:
            raise UserError(f'model.class_weights: balanced: found no training row of the label {name!r}')
    if task.multi_label:
        return _lacking_to_having({name: counts[name] for name in task.label_names}, len(StreamRows(streams)))
    rows = sum(counts[name] for name in task.label_names)
    return [rows / (len(task.label_names) * counts[name]) for name in task.label_names]


def _lacking_to_having(counts: Mapping[str, int], rows: int) -> list[float]:
    """How many of the rows lack each class, for one that has it."""
    for name, count in counts.items():
        if count == rows:
            raise UserError(f'model.class_weights: balanced: found no training row without the label {name!r}')
    return [(rows - count) / count for count in counts.values()]


def settled(config: Config, task: Task, streams: Sequence[TripletStream]) -> Config:
    """The config with what the training rows settle: the labels that were found, the class weights as numbers."""
    config = copy.copy(config)
    if not load_task(config.task).labels:
        given = config.task if isinstance(config.task, Mapping) else task.to_dict()
        config.task = {**given, 'labels': [dataclasses.asdict(label) for label in task.labels]}
    if config.model.class_weights == 'balanced':
        config.model = dataclasses.replace(config.model, class_weights=once_a_node(lambda: balanced(streams, task)))
    return config
