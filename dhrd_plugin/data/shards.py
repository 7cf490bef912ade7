"""Shards: writing triplets as MDS, whole or not at all, and the cache of shards made on first use.

A set of shards is a folder of ``shard.*.mds``, Streaming's ``index.json``, and ``triplets.json``, which
says what is in it: task, label names, counts. ``index.json`` comes last; without it nothing trains.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dhrd_plugin.data.rows import MAX_ROW_BYTES, source_file
from dhrd_plugin.data.tasks import BadRow, Task, check_rationale, check_text, check_weight
from dhrd_plugin.data.triplets import Triplet, apply_control, read_triplets
from dhrd_plugin.errors import UserError

__all__ = ['COLUMNS', 'cached_shards', 'check_triplet', 'is_whole', 'read_summary', 'write_triplets']

COLUMNS = {
    'id': 'str', 'input_text': 'str', 'label': 'str', 'answer': 'str', 'rationale': 'json',
    'weight': 'float64', 'group': 'str',
}  # fmt: skip
HASHES = ('sha1', 'xxh64')
SHARD_BYTES = 1 << 25  # 32 MiB
SUMMARY = 'triplets.json'
FORMAT = 1  # of the shards and the summary; a change makes every cached set a new one


def write_triplets(
    triplets: Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    task: Task | None = None,
    compression: str | None = None,
    hashes: Sequence[str] = HASHES,
    size_limit: int = SHARD_BYTES,
    workers: int = 1,
    overwrite: bool = False,
    summary: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes triplets to a folder of MDS shards.

    The folder appears at the end, whole; an error or a kill before that leaves what was there. Rows
    keep their order, and the bytes do not depend on the number of workers.

    Args:
        triplets (Iterable[Mapping]): triplets; ``id``, ``input_text`` and ``label`` are needed, the
            answer defaults to the task's word for the label (or the label), the rationale to None.
        out (str | Path): the folder to write.
        task (Task, optional): its labels are the ones allowed. Default: None, any label.
        compression (str, optional): Streaming's name of one, such as ``zstd`` or ``zstd:11``. Default: None.
        hashes (Sequence[str]): hashes of the shards in the index. Default: sha1, xxh64.
        size_limit (int): the size of a shard in characters, about. Default: 32 Mi.
        workers (int): processes that write. Default: 1, this one.
        overwrite (bool): whether a set that is there may be replaced. Default: False.
        summary (Mapping, optional): what else ``triplets.json`` shall say; read at the end.

    Returns:
        dict: the summary, as written to ``triplets.json``.

    Raises:
        UserError: a triplet is not one, there is none, or ``out`` holds something already.

    Example:
        >>> rows = [{'id': '0', 'input_text': 'Is water wet?', 'label': 'yes', 'rationale': 'It wets.'}]
        >>> write_triplets(rows, tmp_path / 'train')['rows']
        1
    """
    out = Path(out).expanduser()
    _check_free(out, overwrite)
    options = {'compression': compression, 'hashes': sorted(hashes)}
    with _beside(out) as folder:
        written = _write(triplets, folder, task, size_limit, workers, options, summary or {})
        _replace(folder, out)
    return written


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
    """The shards of a source file, written on first use into a folder named by the content.

    The name is a hash over the bytes of the files, the task and the options: a changed file is never
    served stale. Any number of processes may ask at the same time.

    Args:
        source (str | Path): a file, or a folder with ``split``; see ``read_triplets``.
        task (Task): the template that the rows fit.
        rationales (str | Path, optional): a file of rationales to join. Default: None.
        split (str, optional): the split, for a folder. Default: None.
        labelled (bool): whether every row must have a label. Default: True.
        control (str): see ``apply_control``. Default: ``ConsistentReasoningLabel``.
        seed (int): of the control's shuffling. Default: 17.
        cache_dir (str | Path, optional): where the folders stand. Default: ``default_cache()``.
        max_row_bytes (int): a longer row is an error. Default: 1 MiB.

    Returns:
        Path: the folder, for ``StreamingDataset(local=...)`` or ``LocalDataset``.

    Raises:
        UserError: a file is missing or a row does not fit.
    """
    if str(source).startswith('hub:'):
        raise UserError(f'{source}: a hub data set has no file to name its cache by; write its shards with '
                        'scripts/prepare_data.py and give that folder')  # fmt: skip
    paths = [source_file(source, split)] + ([source_file(rationales)] if rationales else [])
    options = {'task': task.to_dict(), 'labelled': labelled, 'control': control, 'seed': seed}
    key = _content_key(paths, options)
    folder = (Path(cache_dir) if cache_dir else default_cache()).expanduser() / key
    if is_whole(folder):
        return folder
    joined: dict[str, int] = {}
    triplets = read_triplets(paths[0], task, rationales, labelled=labelled, max_row_bytes=max_row_bytes, report=joined)
    summary = {**options, 'key': key, 'joined': joined, 'sources': [str(path) for path in paths]}
    triplets = apply_control(triplets, control, seed)
    with _beside(folder) as temporary:
        _write(triplets, temporary, task, SHARD_BYTES, 1, {'hashes': list(HASHES)}, summary)
        try:
            os.rename(temporary, folder)
        except OSError:  # something is there: another process was quicker, or it is half a set
            if not is_whole(folder):
                _replace(temporary, folder)
    return folder


def default_cache() -> Path:
    """``$DHRD_CACHE/shards``, or ``~/.cache/dhrd_plugin/shards``."""
    return Path(os.environ.get('DHRD_CACHE', '~/.cache/dhrd_plugin')).expanduser() / 'shards'


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a finished set of shards."""
    return (folder / 'index.json').is_file()


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """What ``triplets.json`` says of a set of shards; None where there is none."""
    path = Path(folder) / SUMMARY
    return json.loads(path.read_text('utf-8')) if path.is_file() else None


def check_triplet(row: Mapping[str, Any], task: Task | None = None) -> Triplet:
    """The row with its defaults filled in, if it is a triplet.

    Raises:
        UserError: a field is missing, unknown or of the wrong type, or the label is not the task's.
    """
    get = row.get
    try:
        if not row.keys() <= COLUMNS.keys():
            (key, *_) = row.keys() - COLUMNS.keys()
            raise BadRow(str(key), f'is no field of a triplet; those are {", ".join(COLUMNS)}')
        label, rationale = check_text(get('label'), 'label', True), get('rationale')
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


def _write(
    triplets: Iterable[Mapping[str, Any]],
    folder: Path,
    task: Task | None,
    size_limit: int,
    workers: int,
    options: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """Shards, summary and, last of all, the index."""
    labels = Counter(dict.fromkeys(task.label_names, 0) if task else {})
    counts: Counter[str] = Counter()
    chunks = _chunks((check_triplet(row, task) for row in triplets), size_limit)
    shards = list(_write_shards(_counted(chunks, labels, counts), folder, workers, options))
    if not shards:
        raise UserError('there is no row to write')
    written = {
        'format': FORMAT,
        'task': task.to_dict() if task else None,
        'label_names': list(task.label_names) if task else sorted(labels),
        'rows': counts['rows'],
        'labels': dict(labels),
        'without_rationale': counts['without_rationale'],
        'shards': len(shards),
        **summary,
    }
    _write_json(folder / SUMMARY, written)
    _write_json(folder / 'index.json', {'version': 2, 'shards': shards})
    return written


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


def _write_shards(
    chunks: Iterable[list[Triplet]], folder: Path, workers: int, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Writes a shard for each chunk; yields their entries of the index in the order of the chunks."""
    jobs = ((folder, number, chunk, options) for number, chunk in enumerate(chunks))
    if workers <= 1:
        for job in jobs:
            yield _write_shard(*job)
        return
    # A server process that has Streaming loaded forks the workers: cheaper than to spawn them, and
    # safer than to fork this process with its threads.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['streaming'])
    with ProcessPoolExecutor(workers, context, initializer=_leave_interrupts_to_parent) as pool:
        waiting: deque[Any] = deque()
        for job in jobs:
            waiting.append(pool.submit(_write_shard, *job))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_shard(folder: Path, number: int, triplets: list[Triplet], options: Mapping[str, Any]) -> dict[str, Any]:
    """Writes one shard; returns its entry of the index."""
    from streaming import MDSWriter

    part = folder / f'part.{number:05}'
    writer = MDSWriter(columns=COLUMNS, out=str(part), size_limit=None, **options)
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
    return entry


# ------------------------------------------------------------------------------------------------
# Folders that appear whole


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A temporary folder in the parent of ``out``, from where a rename takes it there; else it vanishes."""
    folder = out.parent / f'.{out.name}.{uuid.uuid4().hex[:8]}.tmp'
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_whole(out):
        raise UserError(f'{out}: is there already and is no set of shards; choose another folder')
    if not overwrite:
        raise UserError(f'{out}: holds a set of shards already; choose another folder or allow overwriting')


def _replace(folder: Path, out: Path) -> None:
    """Renames ``folder`` to ``out``; what was there goes aside first, and away at the end."""
    old = folder.with_suffix('.old')
    if out.exists():
        os.rename(out, old)
    os.rename(folder, out)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + '\n', 'utf-8')


def _content_key(paths: Sequence[Path], options: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, options]).encode())
    for path in paths:
        content = hashlib.sha256(path.suffix.encode())
        with path.open('rb') as file:
            while block := file.read(1 << 20):
                content.update(block)
        digest.update(content.digest())
    return digest.hexdigest()
