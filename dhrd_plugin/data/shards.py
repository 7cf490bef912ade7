"""Shards: writing triplets as MDS, and the cache of shards made on first use.

A set of shards is a folder of ``shard.*.mds``, Streaming's ``index.json``, and ``triplets.json``, which
says what is in it: task, label names, counts. ``index.json`` comes last; without it nothing trains.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from dhrd_plugin import files
from dhrd_plugin.data.publish import check_free, is_whole, publish, staged
from dhrd_plugin.data.remote import is_remote
from dhrd_plugin.data.rows import MAX_ROW_BYTES, read_hub, source_file
from dhrd_plugin.data.tasks import BadRow, Task, check_rationale, check_text, check_weight
from dhrd_plugin.data.triplets import Triplet, apply_control, read_triplets
from dhrd_plugin.errors import UserError

__all__ = ['COLUMNS', 'cached_shards', 'check_triplet', 'is_whole', 'read_summary', 'write_set', 'write_triplets']

COLUMNS = {
    'id': 'str', 'input_text': 'str', 'label': 'str', 'answer': 'str', 'rationale': 'json',
    'weight': 'float64', 'group': 'str',
}  # fmt: skip
HASHES = ('sha1', 'xxh64')
SHARD_SIZE = 1 << 24  # 16 Mi
SUMMARY = 'triplets.json'
FORMAT = 1  # of the shards and the summary; a change makes every cached set a new one
_SIZES, _WEIGHT = struct.Struct('=6I').pack, struct.Struct('=d').pack

Look = Callable[[list[Triplet]], Any]


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
    """Writes triplets as MDS shards to a folder or to object storage.

    The set appears at the end, whole; an error or a kill before that leaves what was there. Rows
    keep their order, and the bytes do not depend on the number of workers.

    Args:
        triplets (Iterable[Mapping]): triplets; ``id``, ``input_text`` and ``label`` are needed, the
            answer defaults to the task's word for the label (or the label), the rationale to None.
        out (str | Path): a folder, or an address such as ``s3://bucket/rte/train``.
        task (Task, optional): its labels are the ones allowed. Default: None, any label.
        compression (str, optional): Streaming's name of one, such as ``zstd`` or ``zstd:11``. Default: None.
        hashes (Sequence[str]): hashes of the shards in the index. Default: sha1, xxh64.
        size_limit (int): the size of a shard in characters, about. Default: 16 Mi.
        workers (int): processes that write. Default: 1, this one.
        labelled (bool): whether every triplet must have a label. Default: True.
        overwrite (bool): whether a set that is there may be replaced. Default: False.

    Returns:
        dict: the summary, as written to ``triplets.json``.

    Raises:
        UserError: a triplet is not one, there is none, or ``out`` holds something already.

    Example:
        >>> rows = [{'id': '0', 'input_text': 'Is water wet?', 'label': 'yes', 'rationale': 'It wets.'}]
        >>> write_triplets(rows, tmp_path / 'train')['rows']
        1
    """
    out = out if is_remote(out) else Path(out).expanduser()
    check_free(out, overwrite)
    with staged(out) as folder:
        summary = write_set(
            triplets,
            folder,
            task,
            compression=compression,
            hashes=hashes,
            size_limit=size_limit,
            workers=workers,
            labelled=labelled,
        )
        publish(folder, out)
    return summary


def write_set(
    triplets: Iterable[Mapping[str, Any]],
    folder: Path,
    task: Task | None = None,
    *,
    compression: str | None = None,
    hashes: Sequence[str] = HASHES,
    size_limit: int = SHARD_SIZE,
    workers: int = 1,
    labelled: bool = True,
    look: Look | None = None,
    more: Callable[[list[Any]], Mapping[str, Any]] = lambda looks: {},
) -> dict[str, Any]:
    """Writes a set into an empty folder: shards, summary and, last of all, the index.

    Args:
        triplets (Iterable[Mapping]): as for ``write_triplets``, and so
        task (Task, optional): Default: None.
        compression (str, optional): Default: None.
        hashes (Sequence[str]): Default: sha1, xxh64.
        size_limit (int): Default: 16 Mi.
        workers (int): Default: 1.
        labelled (bool): Default: True.
        folder (Path): of ``staged``.
        look (Callable, optional): called on the triplets of each shard by the process that writes it.
        more (Callable): what else ``triplets.json`` shall say, from the results of ``look`` in the
            order of the shards. Called when all is written. Default: nothing.

    Returns:
        dict: the summary.
    """
    options = {'compression': compression, 'hashes': sorted(set(hashes))}
    _check_options(options)
    labels = Counter(dict.fromkeys(task.label_names, 0) if task else {})
    counts: Counter[str] = Counter()
    chunks = _chunks((check_triplet(row, task, labelled) for row in triplets), size_limit)
    jobs = ((folder, number, chunk, options, look) for number, chunk in enumerate(_counted(chunks, labels, counts)))
    shards, looks = [], []
    for shard, seen in _write_shards(jobs, workers):
        shards.append(shard)
        looks.append(seen)
    if not shards:
        raise UserError('there is no row to write')
    summary = {
        'format': FORMAT,
        'task': task.to_dict() if task else None,
        'label_names': list(task.label_names) if task else sorted(labels),
        'rows': counts['rows'],
        'labels': dict(labels),
        'without_rationale': counts['without_rationale'],
        'shard_count': len(shards),
        'shards': [],  # Streaming's merge_index takes every .json of a tree for an index: this one adds nothing
        'bytes': sum((shard['zip_data'] or shard['raw_data'])['bytes'] for shard in shards),
        **more(looks),
    }
    files.write_json(folder / SUMMARY, summary)
    files.write_json(folder / 'index.json', {'version': 2, 'shards': shards})
    return summary


def cached_shards(
    source: str | Path,
    task: Task,
    rationales: str | Path | None = None,
    split: str | None = None,
    labelled: bool = True,
    *,
    control: str = 'ConsistentReasoningLabel',
    seed: int = 17,
    cache_dir: str | Path | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Path:
    """The shards of a source, written on first use into a folder named by the content.

    The name is a hash over the bytes of the files (or the rows of a hub data set), the task and the
    options: a changed file is never served stale. Any number of processes may ask at the same time.

    Args:
        source (str | Path): a file, a folder with ``split``, or ``hub:``; see ``read_triplets``.
        task (Task): the template that the rows fit.
        rationales (str | Path, optional): a file of rationales to join. Default: None.
        split (str, optional): the split, for a folder and the hub. Default: None.
        labelled (bool): whether every row must have a label. Default: True.
        control (str): see ``apply_control``. Default: ``ConsistentReasoningLabel``.
        seed (int): of the control's shuffling. Default: 17.
        cache_dir (str | Path, optional): where the folders stand. Default: ``shards`` in ``files.cache_dir()``.
        max_row_bytes (int): a longer row is an error. Default: 1 MiB.

    Returns:
        Path: the folder, for ``StreamingDataset(local=...)`` or ``LocalDataset``.

    Raises:
        UserError: a file is missing or a row does not fit.
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
            apply_control(triplets, control, seed),
            temporary,
            task,
            labelled=labelled,
            more=lambda looks: {**options, 'key': key, 'joined': joined, 'source': str(source)},
        )
        try:
            os.rename(temporary, folder)
        except OSError:  # something is there: another process was quicker, or it is half a set
            if not is_whole(folder):
                publish(temporary, folder)
    return folder


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """What ``triplets.json`` says of a set of shards; None where there is none."""
    path = Path(folder) / SUMMARY
    return json.loads(path.read_text('utf-8')) if path.is_file() else None


def check_triplet(row: Mapping[str, Any], task: Task | None = None, labelled: bool = True) -> Triplet:
    """The row with its defaults filled in, if it is a triplet.

    Raises:
        UserError: a field is missing, unknown or of the wrong type, or the label is not the task's.
    """
    get = row.get
    try:
        if not row.keys() <= COLUMNS.keys():
            (key, *_) = row.keys() - COLUMNS.keys()
            raise BadRow(str(key), f'is no field of a triplet; those are {", ".join(COLUMNS)}')
        label, rationale = check_text(get('label'), 'label', not labelled), get('rationale')
        if task and label and label not in task.answers:
            raise BadRow('label', f'{label!r} is none of {", ".join(task.label_names)}')
        answer = row['answer'] if 'answer' in row else task.answers.get(label, '') if task else label
        return {
            'id': check_text(get('id'), 'id'),
            'input_text': check_text(get('input_text'), 'input_text'),
            'label': label,
            'answer': check_text(answer, 'answer', not label),
            'rationale': rationale if rationale == '' else check_rationale(rationale, 'rationale'),
            'weight': check_weight(get('weight'), 'weight'),
            'group': check_text(get('group', ''), 'group', True),
        }
    except BadRow as error:
        raise error.at(f'triplet {row.get("id", "without id")!r}', dict(row)) from None


# ------------------------------------------------------------------------------------------------
# Writing


def _counted(chunks: Iterable[list[Triplet]], labels: Counter[str], counts: Counter[str]) -> Iterator[list[Triplet]]:
    for chunk in chunks:
        labels.update(triplet['label'] for triplet in chunk)
        counts['rows'] += len(chunk)
        counts['without_rationale'] += sum(triplet['rationale'] is None for triplet in chunk)
        yield chunk


def _chunks(triplets: Iterable[Triplet], limit: int) -> Iterator[list[Triplet]]:
    """Runs of triplets of at most ``limit`` characters, one shard each, whoever writes it."""
    chunk: list[Triplet] = []
    size = 0
    for triplet in triplets:
        rationale = triplet['rationale'] or ''
        texts = [rationale] if isinstance(rationale, str) else rationale
        length = len(triplet['input_text']) + sum(map(len, texts))
        if chunk and size + length > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(triplet)
        size += length
    if chunk:
        yield chunk


def _write_shards(jobs: Iterable[tuple[Any, ...]], workers: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Runs the jobs of ``_write_shard``; yields what they give in their order."""
    if workers <= 1:
        for job in jobs:
            yield _write_shard(*job)
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
    """Ctrl-C is the parent's business, and when the parent is killed its workers end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _write_shard(
    folder: Path, number: int, triplets: list[Triplet], options: Mapping[str, Any], look: Look | None
) -> tuple[dict[str, Any], Any]:
    """Writes one shard; returns its entry of the index, and what ``look`` saw."""
    from streaming import MDSWriter

    part = folder / f'part.{number:05}'
    writer = MDSWriter(columns=COLUMNS, out=str(part), size_limit=None, **options)
    writer.encode_sample = encode_triplet  # pyright: ignore[reportAttributeAccessIssue]
    for triplet in triplets:
        writer.write(triplet)  # pyright: ignore[reportArgumentType]
    writer.flush_shard()  # not finish(): that writes an index, and may sleep a second over it
    writer.executor.shutdown()
    (entry,) = writer.shards
    for file in (entry['raw_data'], entry['zip_data']):
        if file:
            name, file['basename'] = file['basename'], file['basename'].replace('00000', f'{number:05}', 1)
            if (part / name).exists():
                os.rename(part / name, folder / file['basename'])
    part.rmdir()
    return entry, look(triplets) if look else None


def encode_triplet(triplet: Triplet) -> bytes:
    """The bytes that ``MDSWriter.encode_sample`` gives for the columns of a triplet, in a third of its time.

    Streaming finds out anew for each value how its column is written, and parses the JSON that it has just made; the
    fields here have been checked. Sizes of what varies, then the columns in the order of their names.
    """
    texts = [
        triplet['answer'].encode(),
        triplet['group'].encode(),
        triplet['id'].encode(),
        triplet['input_text'].encode(),
        triplet['label'].encode(),
        json.dumps(triplet['rationale']).encode(),
    ]
    return b''.join((_SIZES(*map(len, texts)), *texts, _WEIGHT(triplet['weight'])))


def _check_options(options: Mapping[str, Any]) -> None:
    from streaming.base.compression import get_compressions, is_compression
    from streaming.base.hashing import get_hashes, is_hash

    name = options['compression']
    if name and not is_compression(name):
        known = ', '.join(sorted(kind for kind in get_compressions() if ':' not in kind))
        raise UserError(f'compression: unknown {name!r}; known are {known}, and levels such as zstd:11')
    for name in options['hashes']:
        if not is_hash(name):
            raise UserError(f'hashes: unknown {name!r}; known are {", ".join(sorted(get_hashes()))}')


# ------------------------------------------------------------------------------------------------
# The cache's key


def _digest_source(source: str | Path, task: Task, split: str | None = None) -> str:
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
