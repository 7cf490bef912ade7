"""Shards: writing triplets as MDS, and the cache of shards made on first use.

A shard set is a folder of ``shard.*.mds``, Streaming's ``index.json``, and ``triplets.json``, which
says what is in it: task, label names, counts. ``index.json`` is written last; without it nothing trains.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from dhrd_plugin import files
from dhrd_plugin.data.controls import PLAIN, apply_control
from dhrd_plugin.data.rows import MAX_ROW_BYTES, read_hub, source_file
from dhrd_plugin.data.tasks import Task
from dhrd_plugin.data.triplet import (
    COLUMNS,
    BadRow,
    Triplet,
    check_cuttable,
    check_label,
    check_probabilities,
    check_rationale,
    check_target,
    check_text,
    check_weight,
    counted_as,
    rationales_of,
    spell,
)
from dhrd_plugin.data.triplets import distinct, read_triplets
from dhrd_plugin.errors import UserError, nearest
from dhrd_plugin.problem_type import MULTI_LABEL
from dhrd_plugin.ranks import end_with_parent
from dhrd_plugin.streams.index import INDEX, SUMMARY
from dhrd_plugin.streams.publish import check_free, is_whole, publish, staged
from dhrd_plugin.streams.remote import is_remote

HASHES = ('sha1', 'xxh64')
SHARD_SIZE = 1 << 24  # 16 Mi
FORMAT = 5  # of the shards and the summary; a change makes every cached set a new one
_SIZES, _WEIGHT = struct.Struct('=8I').pack, struct.Struct('=d').pack

Survey = Callable[[list[Triplet]], Any]


def write_triplets(
    triplets: Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    task: Task | None = None,
    compression: str | None = None,
    hashes: Sequence[str] = HASHES,
    size_limit: int = SHARD_SIZE,
    workers: int = 1,
    labelled: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write triplets as MDS shards to a folder or to object storage.

    The set appears at the end, whole; an error or a kill before that leaves what was there. Rows
    keep their order, and the bytes do not depend on the number of workers.

    Args:
        triplets: ``id``, ``input_text`` and ``label`` (or ``probabilities``) are needed; the answer defaults to the
            task's word for the label (or the label), the rationale to None.
        out: a folder, or an address such as ``s3://bucket/rte/train``.
        task: its labels are the ones allowed. Default: None, any label.
        compression: Streaming's name of one, such as ``zstd`` or ``zstd:11``. Default: None.
        hashes: of the shards, for the index. Default: sha1, xxh64.
        size_limit: the size of a shard in characters, about. Default: 16 Mi.
        workers: processes that write. Default: 1, this one.
        labelled: whether every triplet must have a label or probabilities. Default: True.
        overwrite: whether a set that is there may be replaced. Default: False.

    Returns:
        The summary, as written to ``triplets.json``.

    Raises:
        UserError: a triplet is not one, there is none, or ``out`` is taken.

    Example:
        >>> rows = [{'id': '0', 'input_text': 'Is water wet?', 'label': 'yes', 'rationale': 'It wets.'}]
        >>> write_triplets(rows, tmp_path / 'train')['rows']
        1
    """
    out = out if is_remote(out) else Path(out).expanduser()
    check_free(out, overwrite)
    checked = distinct(check_triplet(row, task, labelled) for row in triplets)
    with staged(out) as folder:
        summary = write_set(checked, folder, task, compression, hashes, size_limit, workers)
        publish(folder, out)
    return summary


def write_set(
    triplets: Iterable[Triplet],
    folder: Path,
    task: Task | None = None,
    compression: str | None = None,
    hashes: Sequence[str] = HASHES,
    size_limit: int = SHARD_SIZE,
    workers: int = 1,
    survey: Survey | None = None,
    more: Callable[[list[Any]], Mapping[str, Any]] = lambda findings: {},
    source: object = 'triplets',
) -> dict[str, Any]:
    """Write a set into an empty folder, shards, summary and, last of all, the index; see :func:`write_triplets`.

    The triplets are those that :func:`check_triplet` returns, whose ids differ.
    ``survey`` is called on the triplets of each shard by the process that writes it, and ``more`` when all is written,
    with the results in the order of the shards; it returns what else ``triplets.json`` shall say. ``source`` is
    where the triplets come from, for errors.
    """
    options = {'compression': compression, 'hashes': sorted(set(hashes))}
    _check_options(options)
    labels = Counter(dict.fromkeys(task.label_names, 0) if task else {})
    options['columns'] = {**COLUMNS, 'label': 'json'} if task and task.multi_label else COLUMNS
    jobs = ((folder, number, chunk, options, survey) for number, chunk in enumerate(_chunks(triplets, size_limit)))
    written = list(_write_shards(jobs, workers))
    if not written:
        raise UserError(f'{source}: found no row to write')
    shards, counts, kinds, findings = zip(*written, strict=True)
    for count in counts:
        labels.update(count)
    summary = {
        'format': FORMAT,
        'task': task.to_dict() if task else None,
        'label_names': list(task.label_names) if task else sorted(filter(None, labels)),
        'rows': sum(found['rows'] for found in kinds),
        'labels': dict(labels),
        **{kind: sum(found[kind] for found in kinds) for kind in kinds[0] if kind != 'rows'},
        'shard_count': len(shards),
        'shards': [],  # Streaming's merge_index takes every .json of a tree for an index: this one adds nothing
        'bytes': sum((shard['zip_data'] or shard['raw_data'])['bytes'] for shard in shards),
        **more(list(findings)),
    }
    files.write_json(folder / SUMMARY, summary)
    files.write_json(folder / INDEX, {'version': 2, 'shards': shards})
    return summary


def cached_shards(
    source: str | Path,
    task: Task,
    rationales: str | Path | None = None,
    split: str | None = None,
    labelled: bool = True,
    *,
    control: str = PLAIN,
    seed: int = 17,
    cache_dir: str | Path | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Path:
    """The shards of a source, written on first use into a folder named by the content.

    The name is a hash over the bytes of the files (or the rows of a hub data set), the task and the
    options: a changed file is never served stale. Any number of processes may ask at the same time.
    For the arguments see :func:`~dhrd_plugin.data.triplets.read_triplets` and
    :func:`~dhrd_plugin.data.controls.apply_control`; ``cache_dir`` is the folder of the folders.
    """
    content = [_digest_source(source, task, split), _digest_source(rationales, task) if rationales else '']
    options = {'task': task.to_dict(), 'labelled': labelled, 'control': control, 'seed': seed}
    key = hashlib.sha256(json.dumps([FORMAT, content, options]).encode()).hexdigest()
    folder = (Path(cache_dir).expanduser() if cache_dir else files.cache_dir() / 'shards') / key
    if is_whole(folder):
        return folder
    joined: dict[str, int] = {}
    triplets = read_triplets(source, task, rationales, split, labelled, max_row_bytes=max_row_bytes, report=joined)
    with staged(folder) as temporary:
        write_set(
            (check_triplet(row, task, labelled) for row in apply_control(triplets, control, seed)),
            temporary,
            task,
            more=lambda _: {**options, 'key': key, 'joined': joined, 'source': str(source)},
            source=source,
        )
        try:
            os.rename(temporary, folder)
        except OSError:  # something is there: another process was faster, or it is half a set
            if not is_whole(folder):
                publish(temporary, folder, half=True)
    return folder


def check_triplet(row: Mapping[str, Any], task: Task | None = None, labelled: bool = True) -> Triplet:
    """Check a triplet, whose label is one of the task's where there is a task, and fill in its defaults."""
    if not isinstance(row, Mapping):
        raise UserError(f'triplets: found {spell(row)}; expected mappings (write_rows takes a DataFrame)')
    get = row.get
    try:
        if not row.keys() <= COLUMNS.keys():
            key = min(row.keys() - COLUMNS.keys(), key=str)
            raise BadRow(str(key), f'is not a field of a triplet; {nearest(key, COLUMNS)}')
        probabilities = check_probabilities(get('probabilities'), 'probabilities', task and task.label_names)
        rationale = get('rationale')
        label = _check_label(get('label'), task, not labelled, probabilities is not None)
        answer = row['answer'] if 'answer' in row else task.answer_of(label) if task else label
        triplet: Triplet = {
            'id': check_text(get('id'), 'id'),
            'input_text': check_text(get('input_text'), 'input_text'),
            'label': label,
            'answer': check_text(answer, 'answer', label == ''),
            'rationale': rationale if rationale == '' else check_rationale(rationale, 'rationale'),
            'weight': check_weight(get('weight'), 'weight'),
            'group': check_text(get('group', ''), 'group', True),
            'probabilities': probabilities,
            'cuttable': check_cuttable(get('cuttable'), row['input_text']),
        }
        return check_target(triplet, 'label', 'rationale') if labelled else triplet
    except BadRow as error:
        raise error.at(f'triplet {row.get("id", "without id")!r}', dict(row)) from None


def _check_label(label: object, task: Task | None, unlabelled: bool, soft: bool) -> str | list[str]:
    """The label of a triplet, '' where it may lack one; ``soft``: it has probabilities."""
    if label is None and (unlabelled or soft):
        return ''
    several = task is not None and task.multi_label
    if label not in ('', None) and isinstance(label, list) != several:
        wanted = 'a list of classes' if several else 'a text (a list is for a task of several labels)'
        raise BadRow('label', f'found {spell(label)}; expected {wanted}')
    if several and soft:
        raise BadRow('probabilities', f'found in a {MULTI_LABEL} task; expected none')
    found = check_label(label, 'label', task and task.answers, unlabelled or soft)
    return sorted(found, key=task.label_names.index) if task and isinstance(found, list) else found


def _chunks(triplets: Iterable[Triplet], limit: int) -> Iterator[list[Triplet]]:
    """Runs of triplets of at most ``limit`` characters, each a shard, whichever process writes it.

    Not ``MDSWriter(size_limit=)``: that knows one process, and other cuts would be other bytes, so other rows.
    """
    chunk: list[Triplet] = []
    size = 0
    for triplet in triplets:
        length = len(triplet['input_text']) + sum(map(len, rationales_of(triplet)))
        if chunk and size + length > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(triplet)
        size += length
    if chunk:
        yield chunk


def _write_shards(jobs: Iterable[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """Run :func:`_write_shard` for each job; yield the results in the order of the jobs."""
    if workers <= 1:
        yield from (_write_shard(*job) for job in jobs)
        return
    # Forked, as a DataLoader's workers are: to import Streaming anew in each would take seconds.
    context = multiprocessing.get_context('fork')
    waiting: deque[Any] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(_write_shard, *job))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError('a worker was killed, perhaps for memory; try fewer workers or smaller shards') from None


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def _write_shard(
    folder: Path, number: int, triplets: list[Triplet], options: Mapping[str, Any], survey: Survey | None
) -> tuple[dict[str, Any], Counter[str], dict[str, int], Any]:
    """Write one shard; returns its entry of the index, its labels, its rows by what they have, the findings."""
    from streaming import MDSWriter

    part = folder / f'part.{number:05}'
    writer = MDSWriter(out=str(part), size_limit=None, **options)
    writer.encode_sample = partial(encode_triplet, columns=options['columns'])  # pyright: ignore[reportAttributeAccessIssue]
    writer.shards = [{}] * number  # by their number it names the next
    for triplet in triplets:
        writer.write(triplet)  # pyright: ignore[reportArgumentType]
    writer.flush_shard()  # not finish(): that writes an index, and may sleep a second over it
    writer.executor.shutdown()
    (file,) = part.iterdir()
    file.rename(folder / file.name)
    part.rmdir()
    labels = Counter(name for triplet in triplets for name in counted_as(triplet))
    kinds = {
        'rows': len(triplets),
        'without_rationale': sum(triplet['rationale'] is None for triplet in triplets),
        'with_probabilities': sum(triplet['probabilities'] is not None for triplet in triplets),
        'without_target': sum(triplet['label'] == '' and triplet['probabilities'] is None for triplet in triplets),
    }
    return writer.shards[-1], labels, kinds, survey(triplets) if survey else None


def encode_triplet(triplet: Triplet, columns: Mapping[str, str] = COLUMNS) -> bytes:
    """The bytes that ``MDSWriter.encode_sample`` gives for a triplet, whose fields are checked, in a third of its time.

    First the sizes of what varies, then the columns in the order of their names. Of ``columns`` only the label's kind
    may be another: json, be it a list or the '' of an unlabelled row.
    """
    label: Any = triplet['label']
    texts = [
        triplet['answer'].encode(),
        json.dumps(triplet['cuttable']).encode(),
        triplet['group'].encode(),
        triplet['id'].encode(),
        triplet['input_text'].encode(),
        (json.dumps(label) if columns['label'] == 'json' else label).encode(),
        json.dumps(triplet['probabilities']).encode(),
        json.dumps(triplet['rationale']).encode(),
    ]
    return b''.join((_SIZES(*map(len, texts)), *texts, _WEIGHT(triplet['weight'])))


def _check_options(options: Mapping[str, Any]) -> None:
    from streaming.base.compression import get_compressions, is_compression
    from streaming.base.hashing import get_hashes, is_hash

    name = options['compression']
    if name and not is_compression(name):
        known = ', '.join(sorted(kind for kind in get_compressions() if ':' not in kind))
        raise UserError(f'compression: unknown {name!r}; expected one of {known}, or a level such as zstd:11')
    for name in options['hashes']:
        if not is_hash(name):
            raise UserError(f'hashes: unknown {name!r}; expected one of {", ".join(sorted(get_hashes()))}')


def _digest_source(source: str | Path, task: Task, split: str | None = None) -> str:
    """A hash of the content of a source, for the name of its shards."""
    digest = hashlib.sha256()
    if str(source).startswith('hub:'):
        for row in read_hub(str(source), task, split):
            digest.update(json.dumps(row.fields, default=str).encode())
        return digest.hexdigest()
    path = source_file(source, split)
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f'{path.suffix} {digest.hexdigest()}'
