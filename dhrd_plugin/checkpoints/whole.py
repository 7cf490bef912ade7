"""Composer's checkpoints: which of them are whole, and which one a run goes on from.

Composer writes a checkpoint straight to its name, so a killed run or a full disk leaves half a file
there. Here a checkpoint is read from end to end before it is trusted: those that torch writes are ZIP
archives, with a checksum of every record. Nothing in it is run to do so.
"""

import io
import logging
import math
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata

from dhrd_plugin.errors import UserError, one_line
from dhrd_plugin.ranks import on_rank_zero
from dhrd_plugin.streams.remote import is_remote

LATEST = 'latest-rank0.pt'  # Composer's link to the last one that it finished
INDEX = '.metadata'  # of a sharded checkpoint; torch writes it last
_NAME = re.compile(r'ep(?P<epoch>\d+)-ba(?P<batch>\d+)(?P<full>-rank0\.pt)?')

# The index of shards: the classes of these modules, and a few names besides.
_INDEX_MODULES = ('torch.distributed.checkpoint.metadata', 'torch.distributed.checkpoint.filesystem')
_INDEX_NAMES = {('torch', 'Size'), ('torch.serialization', '_get_layout'), ('pathlib', 'PosixPath')}

log = logging.getLogger(__name__)


def newest_checkpoint(save_folder: str, sharded: bool = False) -> str | None:
    """The newest whole checkpoint of a folder; those that are not whole are passed over, each with a warning.

    Newest is what Composer's ``latest`` link names, then come those of earlier batches. Every rank
    must call it; rank 0 looks.

    Args:
        save_folder: a folder, or an address such as ``s3://bucket/rte``.
        sharded: whether the run saves folders of shards (``state_dict_type: sharded`` of FSDP) and no files.

    Returns:
        Its path or address; None where there is none.
    """
    return on_rank_zero(lambda: _newest(save_folder, sharded))


def check_checkpoint(path: str) -> None:
    """Refuse a checkpoint that is not whole. Every rank must call it; rank 0 reads.

    Args:
        path: a file, a folder of shards, or the address of either.
    """

    def check() -> None:
        flaw = find_flaw(path)
        if flaw is not None:
            raise UserError(f'load_path: {path}: {flaw}; expected a whole checkpoint of Composer')

    on_rank_zero(check)


def check_unused(save_folder: str, sharded: bool = False, load_path: str | None = None) -> None:
    """Refuse a folder that holds checkpoints, of a run that goes on from ``load_path`` only later ones.

    Composer would refuse them after the model is loaded; in object storage in the midst of the run. Every rank must
    call it; rank 0 looks.
    """
    check_kind(save_folder, sharded)
    newest = on_rank_zero(lambda: next(iter(list_checkpoints(save_folder, sharded)), None))
    if newest and not (load_path and _batch(load_path) >= _batch(newest)):
        raise UserError(
            f'save_folder: {save_folder}: found checkpoints; expected autoresume=true to go on from them, '
            'save_overwrite=true, or another folder'
        )


def _batch(path: str) -> float:
    """The batch in a checkpoint's name; of a link to the latest in object storage one after all, without one -1."""
    name = (path if is_remote(path) else os.path.realpath(path)).rstrip('/').rpartition('/')[2]
    found = _NAME.fullmatch(name.replace('{rank}', '0'))
    return int(found['batch']) if found else math.inf if name.startswith('latest') else -1


def check_kind(save_folder: str, sharded: bool = False) -> None:
    """Refuse a folder that holds checkpoints of the other kind alone. Every rank must call it; rank 0 looks."""

    def check() -> None:
        if list_checkpoints(save_folder, not sharded) and not list_checkpoints(save_folder, sharded):
            found, own = ('files', 'shards') if sharded else ('shards', 'files')
            raise UserError(
                f'save_folder: {save_folder}: found checkpoints in {found}, and this run saves {own}; expected '
                'fsdp_config.state_dict_type as it was, save_overwrite=true, or another folder'
            )

    on_rank_zero(check)


def list_checkpoints(save_folder: str, sharded: bool = False) -> list[str]:
    """Every checkpoint of a folder, whole or not, newest first; see :func:`newest_checkpoint`."""
    names, latest = _names(save_folder)
    steps = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match and (match['full'] is None) == sharded:
            steps[name] = int(match['batch']), int(match['epoch'])
    newest = steps.get(latest, max(steps.values(), default=(0, 0)))
    found = [name for name in steps if steps[name] <= newest]
    return [f'{save_folder.rstrip("/")}/{name}' for name in sorted(found, key=lambda name: steps[name], reverse=True)]


def find_flaw(path: str) -> str | None:
    """Why a checkpoint is not whole; None if it is.

    Args:
        path: a file or an object, which is read to its end; or a folder of shards. Those of an object
            store are not read, only their sizes are compared with the index.

    Raises:
        UserError: the object store cannot be reached or refuses, which says nothing of the checkpoint.
    """
    path = path.replace('{rank}', '0')
    if is_packed(path):
        return None  # never written by a run of ours; Composer's unpacking has checksums of its own
    try:
        if not is_remote(path):
            return _flaw_of_shards(Path(path)) if Path(path).is_dir() else _flaw_of_zip(Path(path))
        with tempfile.TemporaryDirectory() as folder:
            return _flaw_of_object(path, Path(folder))
    except UserError:
        raise
    except FileNotFoundError as error:
        missing = str(error.filename or path)
        return 'no such file' if missing == path else f'{missing} is missing'
    except Exception as error:  # damaged bytes make zipfile, struct and pickle raise almost anything
        return f'damaged ({one_line(error) or type(error).__name__})'


def is_packed(path: str) -> bool:
    """Whether a checkpoint is compressed or an archive, by its name."""
    if path.endswith('.pt') or Path(path).is_dir():
        return False
    from composer.utils import is_compressed_pt, is_tar

    return is_tar(path) or is_compressed_pt(path)


def _newest(save_folder: str, sharded: bool) -> str | None:
    for path in list_checkpoints(save_folder, sharded):
        flaw = find_flaw(path)
        if flaw is None:
            return path
        log.warning('%s: %s; passed over', path, flaw)
    return None


def _names(save_folder: str) -> tuple[set[str], str | None]:
    """What lies in a folder, and what the ``latest`` link names."""
    if not is_remote(save_folder):
        folder = Path(save_folder)
        link = folder / LATEST
        latest = os.path.basename(os.readlink(link)) if link.is_symlink() else None
        return ({entry.name for entry in folder.iterdir()} if folder.is_dir() else set()), latest
    from composer.utils import extract_path_from_symlink, maybe_create_object_store_from_uri, parse_uri

    store: Any = maybe_create_object_store_from_uri(save_folder)
    prefix = parse_uri(save_folder)[2].strip('/')
    inside = f'{prefix}/' if prefix else ''
    with reading(save_folder):
        names = {name.removeprefix(inside).split('/')[0] for name in store.list_objects(inside)}
        link = f'{LATEST}.symlink'
        return names, extract_path_from_symlink(f'{inside}{link}', store).split('/')[-1] if link in names else None


@contextmanager
def reading(address: str) -> Iterator[None]:
    """What an object store refuses inside, in one line with the address; FileNotFoundError passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # of many kinds, one for each provider
        raise UserError(f'{address}: cannot be read: {one_line(error, kind=True)}') from error


def _flaw_of_zip(file: Any) -> str | None:
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    return damaged and f'{damaged} in it is damaged'


def _flaw_of_shards(folder: Path) -> str | None:
    for name, pieces in _shards(folder).items():
        with open(folder / name, 'rb') as file:
            for offset, length in pieces:
                file.seek(offset)
                flaw = _flaw_of_zip(io.BytesIO(file.read(length)))
                if flaw is not None:
                    return f'{name}: {flaw}'
    return None


def _flaw_of_object(address: str, folder: Path) -> str | None:
    from composer.utils import get_file, maybe_create_object_store_from_uri, parse_uri

    store: Any = maybe_create_object_store_from_uri(address)
    name = parse_uri(address)[2]
    if _NAME.fullmatch(name.split('/')[-1]) is None or name.endswith('.pt'):
        with reading(address):
            get_file(name, str(folder / 'checkpoint'), store, progress_bar=False)
        return _flaw_of_zip(folder / 'checkpoint')
    with reading(address):
        get_file(f'{name}/{INDEX}', str(folder / INDEX), store, progress_bar=False)
    for shard, pieces in _shards(folder).items():
        end = max(offset + length for offset, length in pieces)
        with reading(address):
            size = store.get_object_size(f'{name}/{shard}')
        if size < end:
            return f'{shard} has {size} bytes of {end}'
    return None


def _shards(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Offsets and lengths of the pieces in each file of a sharded checkpoint, by its index."""
    pieces: dict[str, list[tuple[int, int]]] = {}
    for piece in ShardReader(folder).read_metadata().storage_data.values():
        pieces.setdefault(piece.relative_path, []).append((piece.offset, piece.length))
    return pieces


class ShardReader(FileSystemReader):
    """Reads a sharded checkpoint's index without running what a pickle may hold."""

    def read_metadata(self) -> Metadata:
        """The index; as torch reads it, of plain kinds only."""
        with (Path(self.path) / INDEX).open('rb') as file:
            metadata = _Unpickler(file).load()
        if getattr(metadata, 'storage_meta', None) is None:
            metadata.storage_meta = self.storage_meta()  # pyright: ignore
        metadata.storage_meta.load_id = self.load_id
        for piece in metadata.storage_data.values():
            if Path(piece.relative_path).name != piece.relative_path:
                raise ValueError(f'{piece.relative_path!r} in its index; expected the plain name of a file')
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in (*_INDEX_MODULES, *dict(_INDEX_NAMES)) else None
        # By where a class is at home: these modules also import ones such as os.
        of_index = isinstance(found, type) and found.__module__ in _INDEX_MODULES
        if of_index or isinstance(found, torch.dtype) or (module, name) in _INDEX_NAMES:
            return found
        raise pickle.UnpicklingError(f'{module}.{name} has no place in the index of a checkpoint')
