"""One set of shards, here or in object storage, whose files are checked before a row of them is read."""

import hashlib
import inspect
import numbers
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from streaming import Stream, StreamingDataset
from streaming.base import partition, shuffle
from streaming.base.compression import decompress
from streaming.base.format import FileInfo, Reader
from streaming.base.spanner import Spanner
from streaming.base.world import World

from dhrd_plugin import files
from dhrd_plugin.data import cache
from dhrd_plugin.data.index import INDEX, check_bytes, check_columns, parse_index, stored_files
from dhrd_plugin.data.remote import ATTEMPTS, TIMEOUT, join, one_line, read
from dhrd_plugin.errors import UserError, nearest
from dhrd_plugin.ranks import once_a_node

WEIGHTS = ('proportion', 'repeat', 'choose')
# Of a stream, or of the dataset for all of its streams.
DOWNLOADS = ('download_retry', 'download_timeout', 'validate_hash', 'keep_zip')
# Options of a StreamingDataset that a loader spells in a place of its own.
ELSEWHERE = {
    **{name: f'belongs to the loader: {name}, without dataset' for name in (
        'remote', 'local', 'streams', 'split', 'shuffle', 'shuffle_seed',
    )},
    'batch_size': 'follows from global_train_batch_size',
    'stream_name': 'is not taken; every stream is one whose shards are checked',
    'stream_config': 'is not taken; every stream is one whose shards are checked',
}  # fmt: skip


class TripletStream(Stream):
    """A Stream whose cache is never stale, and whose shards are checked against the hashes of the index.

    It is ready when it is built: the remote's index has been read, by one rank of each node, and the
    cache is one of the set as it is now. Every rank has to build it.

    Args:
        remote (str, optional): a folder or an address such as ``s3://bucket/rte/train``. Default: None,
            the shards are in ``local``.
        local (str, optional): the folder that caches the remote, or holds the shards. Default: a folder
            named by the remote's address and content, in ``cache_dir``.
        split (str, optional): a folder in ``remote`` and in ``local``. Default: None.
        key (str): what errors shall blame, such as ``train_loader``. Default: nothing.
        cache_dir (str, optional): Default: ``streams`` in ``files.cache_dir()``.
        download_retry (int): attempts to download a file, all of them. Default: 5.
        download_timeout (float): seconds that one attempt may take. Default: 60.
        validate_hash (str, optional): a hash that the index must hold. Default: None; every hash that
            the index holds is checked in any case.
        keep_zip (bool): whether compressed shards are kept beside the raw ones. Default: False.
        **weights: ``proportion``, ``repeat`` or ``choose``.

    Raises:
        UserError: the remote cannot be reached, holds no finished set of triplets, or the cache is in use
            by a run that reads another set.
    """

    def __init__(
        self,
        *,
        remote: str | None = None,
        local: str | None = None,
        split: str | None = None,
        key: str = '',
        cache_dir: str | None = None,
        download_retry: int = ATTEMPTS,
        download_timeout: float = TIMEOUT,
        validate_hash: str | None = None,
        keep_zip: bool = False,
        **weights: Any,
    ):
        if not (remote or local):
            raise UserError(f'{key or "stream"}: found neither remote nor local')
        self.key = key
        self.place = str(remote or Path(local or '').expanduser())
        self.downloads = {'attempts': download_retry, 'timeout': download_timeout}
        place = partial(_find, self, remote, local, split or '', cache_dir, validate_hash)
        super().__init__(
            remote=remote,
            local=once_a_node(place),
            split=split,
            download_retry=download_retry,
            download_timeout=download_timeout,
            validate_hash=validate_hash,
            keep_zip=keep_zip,
            **weights,
        )

    def blame(self, name: str, problem: object) -> UserError:
        """An error of the key ``name`` of this stream."""
        return UserError(f'{self.key}.{name}: {problem}' if self.key else str(problem))

    def address(self, name: str) -> str:
        """Where a file of the set comes from."""
        return str(join(self.place, self.split, name))

    def check_shard(self, shard: Reader) -> None:
        """Compares the files of a shard that are here with the index; a damaged one leaves the cache.

        Raises:
            UserError: naming the file.
        """
        for raw, _ in shard.file_pairs:
            path = Path(self.local, self.split, raw.basename)
            if not path.is_file():
                continue  # checked when it is downloaded
            try:
                check_bytes(path.read_bytes(), vars(raw), path.resolve())
            except UserError as error:
                if self.remote is None:
                    raise self.blame('local', error) from None
                path.unlink(missing_ok=True)
                raise self.blame('local', f'{error}; it is removed from the cache: start again') from None

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        """Streaming's, but a file that is damaged or half there never has the name of a whole one."""
        folder = Path(self.local, self.split)
        if (folder / raw_info.basename).is_file():
            return 0
        stored, added = zip_info or raw_info, raw_info.bytes
        data, source = self._read(folder / stored.basename, stored)
        if zip_info:
            if self.safe_keep_zip and source != folder / stored.basename:
                files.write_bytes(folder / stored.basename, data)
                added += zip_info.bytes
            try:
                data = decompress(compression, data)
            except Exception as error:  # of many kinds, one for each compression
                raise self.blame('remote', f'{source}: cannot be decompressed: {one_line(error)}') from None
            self._check(data, raw_info, source)
        files.write_bytes(folder / raw_info.basename, data)
        return added

    def _read(self, path: Path, info: FileInfo) -> tuple[bytes, str | Path]:
        """The stored bytes of a file, as the index describes them: from here, else from the remote."""
        if path.is_file():
            data = path.read_bytes()
            self._check(data, info, path.resolve())
            return data, path
        source = self.address(info.basename)
        for again in (True, False):
            try:
                data = read(source, **self.downloads) if self.remote else None
            except UserError as error:
                raise self.blame('remote', error) from None
            if data is None:
                raise self.blame('remote', f'{source}: is not there, though the index names it')
            try:
                check_bytes(data, vars(info), source)
                break
            except UserError as error:
                if not again:  # so it was not on the way that it was damaged
                    raise self.blame('remote', error) from None
        return data, source

    def _check(self, data: bytes, info: FileInfo, where: str | Path) -> None:
        try:
            check_bytes(data, vars(info), where)
        except UserError as error:
            raise self.blame('remote' if self.remote else 'local', error) from None


def _find(
    stream: TripletStream, place: str | None, local: str | None, split: str, cache_dir: str | None, wanted: str | None
) -> str:
    """A link to the folder of the set, which has its index; made by one rank of a node."""
    where = f'{join(stream.place, split, INDEX)}'
    blamed = 'remote' if place else 'local'
    try:
        index = read(where, **(stream.downloads if place else {}))
        if index is None:
            raise UserError(f'{join(stream.place, split)}: has no {INDEX}, so it is no finished set of shards')
        entries = parse_index(index, where)
        check_columns(entries, stream.place)
        _check_hashes(entries, where, wanted)
        if place is None:
            folder = Path(local or '').expanduser()
            _check_whole(folder / split, entries)
        else:
            blamed = 'local' if local else blamed
            folder = Path(local).expanduser() if local else cache.default_folder(place, index, cache_dir)
            cache.claim(folder / split, index, str(join(place, split)))
            cache.drop_cut_files(folder / split, entries)
        return str(cache.link(folder))
    except UserError as error:
        raise stream.blame(blamed, error) from None


def _check_hashes(entries: Sequence[Mapping[str, Any]], where: str, wanted: str | None) -> None:
    hashes = set.intersection(*(set(file['hashes']) for entry in entries for file in stored_files(entry)))
    if wanted and wanted not in hashes:
        raise UserError(f'{where}: holds no hash {wanted!r} (validate_hash); {nearest(wanted, sorted(hashes))}')
    if not hashes:
        warnings.warn(f'{where}: holds no hashes, so damaged shards go unseen', stacklevel=2)


def _check_whole(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    for entry in entries:
        for kind in ('data', 'meta'):
            stored = [entry[f'{form}_{kind}'] for form in ('raw', 'zip') if entry.get(f'{form}_{kind}')]
            if stored and not any((folder / file['basename']).is_file() for file in stored):
                raise UserError(f'{folder}: has no {stored[-1]["basename"]}, which the index names')


def fingerprint(streams: Sequence['TripletStream']) -> str:
    """SHA-256 of the indexes of some shards, which hold the hashes of the shards themselves."""
    digest = hashlib.sha256()
    for stream in streams:
        digest.update(Path(stream.local, stream.split, INDEX).read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# Rows by index


class StreamRows:
    """The rows of streams by index, one stream after the other; a shard is fetched when it is first read.

    Without the shared memory of a StreamingDataset: any number of processes may read the same folder.

    Args:
        streams (Sequence[TripletStream]): whose weights are not looked at.
    """

    def __init__(self, streams: Sequence[TripletStream]):
        world = World.detect()
        with reworded(streams[0].key):
            self.shards = [(stream, shard) for stream in streams for shard in stream.get_shards(world, False)]
        self.spanner = Spanner(np.array([len(shard) for _, shard in self.shards], np.int64))
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return int(self.spanner.num_samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = self.spanner[index]
        self._prepare(int(number))
        return self.shards[number][1][row]

    def fetch(self) -> None:
        """Fetch every shard now, once a node."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._prepare, range(len(self.shards))))

    def _prepare(self, number: int) -> None:
        if number not in self._checked:
            stream, shard = self.shards[number]
            stream.check_shard(shard)
            stream.prepare_shard(shard)
            self._checked.add(number)


# ------------------------------------------------------------------------------------------------
# Settings of a loader: local, remote, split, streams, dataset, cache_dir


def build_streams(settings: Mapping[str, Any], key: str) -> list[TripletStream]:
    """The streams of a loader; see ``check_settings``.

    Args:
        settings (Mapping): ``streams`` by name, or ``remote`` and ``local``; ``split``, ``cache_dir``, and
            in ``dataset`` what holds for every stream.
        key (str): of the loader, for messages.
    """
    common = {name: settings['dataset'].get(name) for name in DOWNLOADS}
    common |= {name: settings[name] for name in ('split', 'cache_dir')}
    streams = settings['streams']
    named = {f'{key}.streams.{name}': stream for name, stream in streams.items()} if streams else {
        key: {name: settings[name] for name in ('remote', 'local')}
    }
    options = [
        {'key': name, **{option: value for option, value in (common | stream).items() if value is not None}}
        for name, stream in named.items()
    ]
    return [TripletStream(**option) for option in options]


def check_settings(settings: Mapping[str, Any], key: str, training: bool = True) -> None:
    """Refuse what Streaming would not take, or would take in silence, before anything is fetched.

    Args:
        settings (Mapping): as for ``build_streams``.
        key (str): of the loader, for messages.
        training (bool): whether rows are streamed; else each is read once, by index. Default: True.

    Raises:
        UserError: naming the stream and the key.
    """
    dataset, streams = settings['dataset'], settings['streams']
    both = [name for name in ('remote', 'local') if settings[name] and streams]
    if both:
        raise UserError(f'{key}: found {both[0]} and streams; expected one of them')
    _check_dataset(dataset, f'{key}.dataset', training)
    for name, stream in streams.items():
        _check_stream(stream, f'{key}.streams.{name}', training)
    _check_mixture(streams, f'{key}.streams')
    if dataset.get('epoch_size') and any(stream.get(weight) for stream in streams.values() for weight in WEIGHTS[1:]):
        raise UserError(f'{key}.dataset.epoch_size: found with repeat or choose, which say how long an epoch is')
    if dataset.get('cache_limit') and not all(stream.get('remote') for stream in streams.values() or [settings]):
        raise UserError(f'{key}.dataset.cache_limit: found with shards that are nowhere else; it would delete them')


def _check_dataset(dataset: Mapping[str, Any], key: str, training: bool) -> None:
    known = set(inspect.signature(StreamingDataset.__init__).parameters) - {'self', *ELSEWHERE}
    for option in dataset:
        if option in ELSEWHERE:
            raise UserError(f'{key}.{option}: {ELSEWHERE[option]}')
        if option not in known:
            raise UserError(f'{key}.{option}: unknown key; {nearest(option, sorted(known))}')
        if not training and option not in DOWNLOADS:
            raise UserError(f'{key}.{option}: found in evaluation, where only {", ".join(DOWNLOADS)} mean something')
    for option, known in (('shuffle_algo', shuffle.algos), ('partition_algo', partition.algos)):
        if option in dataset and dataset[option] not in known:
            raise UserError(f'{key}.{option}: found {dataset[option]!r}; {nearest(dataset[option], sorted(known))}')
    _check_downloads(dataset, key)


def _check_stream(stream: Any, key: str, training: bool) -> None:
    known = [name for name in inspect.signature(Stream.__init__).parameters if name != 'self']
    if not isinstance(stream, Mapping):
        raise UserError(f'{key}: found {stream!r}; expected a mapping with remote or local')
    for option in stream:
        if option not in known:
            raise UserError(f'{key}.{option}: unknown key; {nearest(option, known)}')
    if not (stream.get('remote') or stream.get('local')):
        raise UserError(f'{key}: found neither remote nor local')
    _check_downloads(stream, key)
    weights = [weight for weight in WEIGHTS if stream.get(weight) is not None]
    if weights and not training:
        raise UserError(f'{key}.{weights[0]}: found in evaluation, where every row is read once')
    if len(weights) > 1:
        raise UserError(f'{key}: found {" and ".join(weights)}; expected at most one of {", ".join(WEIGHTS)}')
    for weight in weights:
        value, kind = stream[weight], numbers.Integral if weight == 'choose' else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value < float('inf'):  # pyright: ignore
            expected = 'a whole number' if weight == 'choose' else 'a number'
            raise UserError(f'{key}.{weight}: found {value!r}; expected {expected} of 0 or more')


def _check_mixture(streams: Mapping[str, Mapping[str, Any]], key: str) -> None:
    used = {
        name: next((weight for weight in WEIGHTS if stream.get(weight) is not None), 'no weight')
        for name, stream in streams.items()
    }
    relative = [name for name, weight in used.items() if weight == 'proportion']
    absolute = [name for name, weight in used.items() if weight != 'proportion']
    if relative and absolute:
        raise UserError(
            f'{key}: found proportion in {relative[0]} and {used[absolute[0]]} in {absolute[0]}; expected proportion '
            'in all of them or in none'
        )
    if streams and all(streams[name].get(weight) == 0 for name, weight in used.items()):
        raise UserError(f'{key}: found only weights of 0; expected one above')


def _check_downloads(settings: Mapping[str, Any], key: str) -> None:
    attempts, seconds = settings.get('download_retry'), settings.get('download_timeout')
    if attempts is not None and (not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1):
        raise UserError(f'{key}.download_retry: found {attempts!r}; expected the number of attempts, 1 or more')
    if seconds is not None and not (isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0):
        raise UserError(f'{key}.download_timeout: found {seconds!r}; expected a number of seconds above 0')


@contextmanager
def reworded(key: str) -> Iterator[None]:
    """Streaming's own complaints in one line that names the key."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f'{key}: {" ".join(str(error).split())}' if key else ' '.join(str(error).split())) from None
