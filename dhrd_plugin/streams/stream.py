"""One shard set, here or in object storage, whose files are checked before a row of them is read."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format import FileInfo, Reader, reader_from_json
from streaming.base.world import World

from dhrd_plugin import files
from dhrd_plugin.errors import UserError, about, nearest, user_errors
from dhrd_plugin.ranks import once_a_node
from dhrd_plugin.streams import cache
from dhrd_plugin.streams.index import (
    INDEX,
    check_bytes,
    check_columns,
    check_inside,
    check_size,
    names_in,
    parse_index,
    stored_files,
)
from dhrd_plugin.streams.remote import ATTEMPTS, TIMEOUT, join, read


class TripletStream(Stream):
    """A Stream whose cache is never stale, and whose shards are checked against the hashes of the index.

    It is ready when it is built: one rank of each node has read the remote's index, and the cache is one
    of the current set. Every rank has to build it.

    Args:
        remote: a folder or an address such as ``s3://bucket/rte/train``. Default: ``None``, the shards are
            in ``local``.
        local: the folder that caches the remote, or holds the shards. Default: a folder named by the
            remote's address and content, in ``cache_dir``.
        split: a folder in ``remote`` and in ``local``. Default: ``None``.
        key: the config key that errors name, such as ``train_loader``. Default: none.
        cache_dir: Default: ``streams`` in :func:`~dhrd_plugin.files.cache_dir`.
        download_retry: how often to try to download a file. Default: 5.
        download_timeout: seconds that one attempt may take. Default: 60.
        validate_hash: a hash that the index must hold. Default: ``None``; every hash that the index holds
            is checked in any case.
        keep_zip: whether compressed shards are kept beside the raw ones. Default: ``False``.
        **weights: ``proportion``, ``repeat`` or ``choose``.
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
        super().__init__(
            remote=remote,
            local=once_a_node(partial(_find, self, remote, local, split or '', cache_dir, validate_hash)),
            split=split,
            download_retry=download_retry,
            download_timeout=download_timeout,
            validate_hash=validate_hash,
            keep_zip=keep_zip,
            **weights,
        )

    def names(self, option: str) -> str:
        """What begins a complaint of an option of this stream: its key; nothing where the stream has none."""
        return f'{self.key}.{option}' if self.key else ''

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """The readers of the shards, from the index in ``local``; Streaming's own would believe whatever stands there.

        Args:
            world: unused; the index is here when the stream is built.
            allow_unsafe_types: whether a shard may hold pickles, which run code when they are read.
        """
        path = Path(self.local, self.split, INDEX)
        shards = [reader_from_json(self.local, self.split, entry) for entry in parse_index(path.read_bytes(), path)]
        for shard in shards:
            shard.validate(allow_unsafe_types)
        return shards

    def check_shard(self, shard: Reader) -> None:
        """Compare the files of a shard that are here with the index; a damaged one is removed from the cache."""
        for raw, _ in shard.file_pairs:
            path = self._path(raw)
            if not path.is_file():
                continue  # checked when it is downloaded
            with about(self.names('local')):
                try:
                    check_bytes(path.read_bytes(), vars(raw), path.resolve())
                except UserError as error:
                    if self.remote is None:
                        raise
                    path.unlink(missing_ok=True)
                    raise UserError(f'{error}; it is removed from the cache: start again') from None

    def _path(self, info: FileInfo) -> Path:
        return Path(self.local, self.split, info.basename)

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        # Streaming's leaves a damaged or partial file under the name of a whole one.
        raw, stored = self._path(raw_info), zip_info or raw_info
        if raw.is_file():
            return 0
        added = raw_info.bytes
        with about(self.names('remote' if self.remote else 'local')), user_errors(raw, OSError):
            data, source = self._read(stored)
            if zip_info:
                if self.safe_keep_zip and source != self._path(stored):
                    files.write_bytes(self._path(stored), data)
                    added += zip_info.bytes
                with user_errors(f'{source}: cannot be decompressed', kind=True):
                    data = decompress(compression, data)
                check_bytes(data, vars(raw_info), source)
            files.write_bytes(raw, data)
        return added

    def _read(self, info: FileInfo) -> tuple[bytes, str | Path]:
        """The stored bytes of a file, checked, and where they come from: the local folder, else the remote."""
        path, source = self._path(info), str(join(self.place, self.split, info.basename))
        if path.is_file():
            data = path.read_bytes()
            check_bytes(data, vars(info), path.resolve())
            return data, path
        data = self._download(source)
        with suppress(UserError):
            check_bytes(data, vars(info), source)
            return data, source
        data = self._download(source)  # again: it may have been damaged on the way
        check_bytes(data, vars(info), source)
        return data, source

    def _download(self, source: str) -> bytes:
        data = read(source, **self.downloads) if self.remote else None
        if data is None:
            raise UserError(f'{source}: is missing, though the index names it')
        return data


def _find(
    stream: TripletStream, place: str | None, local: str | None, split: str, cache_dir: str | None, wanted: str | None
) -> str:
    """A link to the folder of the set, which has its index; made by one rank of a node."""
    where = str(join(stream.place, split, INDEX))
    with about(stream.names('remote' if place else 'local')):
        index = read(where, **(stream.downloads if place else {}))
        if index is None:
            raise UserError(f'{join(stream.place, split)}: has no {INDEX}, so it is not a finished shard set')
        entries = parse_index(index, where)
        check_columns(entries, stream.place)
        _check_hashes(entries, where, wanted)
    with about(stream.names('local' if local else 'remote')):
        folder = Path(local).expanduser() if local else cache.default_folder(place or '', index, cache_dir)
        check_inside(folder / split, names_in(entries))
        if place is None:
            _check_whole(folder / split, entries)
        else:
            cache.claim(folder / split, index, str(join(place, split)))
            cache.drop_cut_files(folder / split, entries)
        return str(cache.link(folder))


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
            here = [file for file in stored if (folder / file['basename']).is_file()]
            if stored and not here:
                raise UserError(f'{folder}: has no {stored[-1]["basename"]}, which the index names')
            for path, file in ((folder / file['basename'], file) for file in here):
                check_size(path.stat().st_size, file, path)
