"""Opens a checkpoint of Composer, full or sharded, here or in an object store; nothing in it is run."""

import collections
import datetime
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.torch_version import TorchVersion

from dhrd_plugin.checkpoints.whole import LATEST, ShardReader, find_flaw, is_packed, reading
from dhrd_plugin.errors import UserError, about, one_line
from dhrd_plugin.streams.remote import check_address, is_remote

# What Composer stores besides tensors and plain data; none of it runs anything when it is loaded.
_PLAIN = [
    collections.deque,
    datetime.timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    type(np.dtype('uint32')),
    np.empty(0).__reduce__()[0],
]
_FOREIGN = re.compile(r'GLOBAL (\S+) was not an allowed global|Trying to (?:load|call reduce for) .*?(\S+\.\S+)')
_WRAPPERS = re.compile(r'(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.')


@dataclass
class Description:
    """What a checkpoint, or a run, is of."""

    metadata: dict[str, Any]  # of a HuggingFaceModel
    shapes: dict[str, tuple[int, ...]]  # of the model's weights, by name
    optimizer: str | None  # the name of its class; None in a checkpoint of weights alone
    trained: int | None  # how many weights it trains; None where that is not known


def read_checkpoint(checkpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read metadata and model of a checkpoint.

    Args:
        checkpoint: a ``.pt`` file, a folder of shards, ``latest-rank0.pt``, or the address of any of
            these in an object store.

    Returns:
        The metadata of its ``HuggingFaceModel``, and the state dict of it.

    Raises:
        UserError: it is not whole, holds more than plain data, or is of another kind.
    """
    with _opened(checkpoint) as path:
        flaw = find_flaw(str(path))
        if flaw is not None:
            raise UserError(f'{checkpoint}: {flaw}; expected a whole checkpoint of Composer')
        state = _read_shards(path) if path.is_dir() else _read_file(path)
        return _metadata(state), _section(state, 'model')


def describe_checkpoint(checkpoint: str) -> Description:
    """Read what a whole checkpoint is of; all that is pickled in it is looked at.

    Args:
        checkpoint: as for :func:`read_checkpoint`.

    Raises:
        UserError: it holds more than plain data, or is of another kind.
    """
    with _opened(checkpoint) as path:
        return _describe_shards(path) if path.is_dir() else _describe_file(path)


def plain_name(name: str) -> str:
    """A weight's name without the wrappers that a trainer puts around a model."""
    return _WRAPPERS.sub('', name)


@contextmanager
def _opened(checkpoint: str) -> Iterator[Path]:
    """The checkpoint's path on this machine; what is read inside is told in one line with the checkpoint."""
    if is_remote(checkpoint):
        check_address(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = checkpoint.replace('{rank}', '0')
        path = _download(checkpoint, Path(scratch)) if is_remote(checkpoint) else Path(checkpoint)
        with about(checkpoint):
            try:
                yield _unpacked(path, Path(scratch) / 'unpacked.pt') if is_packed(str(path)) else path
            except UserError:
                raise
            except (Exception, CheckpointException) as error:  # damaged bytes make torch raise almost anything
                raise UserError(f'cannot be read: {_refusal(error)}') from error


def _unpacked(path: Path, out: Path) -> Path:
    from composer.utils import is_tar
    from composer.utils.compression import get_compressor

    if is_tar(path):
        raise UserError('it is a tar archive; expected the .pt file in it')
    with get_compressor(str(path)).decompress(str(path)) as file, out.open('wb') as unpacked:
        shutil.copyfileobj(file, unpacked)
    return out


def _refusal(error: BaseException) -> str:
    """The reason in one line; torch gives advice on how to run what it refused."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    found = _FOREIGN.search(str(error))
    if found is None:
        return one_line(error) or type(error).__name__
    return f'it names {found[1] or found[2]}, which is no plain data and was not run; expected a checkpoint of Composer'


def _download(address: str, folder: Path) -> Path:
    from composer.utils import extract_path_from_symlink, get_file, maybe_create_object_store_from_uri, parse_uri

    name = parse_uri(address)[2]
    try:
        with reading(address):
            store = maybe_create_object_store_from_uri(address)
            if name.split('/')[-1] == LATEST:
                name = extract_path_from_symlink(f'{name}.symlink', store)
            inside = [found for found in store.list_objects(f'{name}/') if not found.endswith('/')]  # pyright: ignore
            for found in inside or [name]:
                get_file(found, str(folder / found.split('/')[-1]), store, progress_bar=False)
    except FileNotFoundError:
        raise UserError(f'{address}: no such file; expected a whole checkpoint of Composer') from None
    return folder if inside else folder / name.split('/')[-1]


def _section(state: Any, name: str) -> dict[str, Any]:
    section = state.get(name) if isinstance(state, dict) else None
    if not isinstance(section, dict):
        raise UserError(f'it holds no {name}; expected a checkpoint of Composer')
    return section


def _metadata(state: dict[str, Any]) -> dict[str, Any]:
    metadata = _section(state, 'integrations').get('huggingface')
    if not metadata:
        raise UserError('it describes no model; expected the checkpoint of a HuggingFaceModel')
    return metadata


# ------------------------------------------------------------------------------------------- one file


def _read_file(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(_PLAIN):
        stored = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    return _section(stored, 'state')


def _describe_file(path: Path) -> Description:
    state = _read_file(path)
    weights = {name: value for name, value in _section(state, 'model').items() if isinstance(value, Tensor)}
    optimizers = state.get('optimizers') or {}
    name = next(iter(optimizers), None)
    groups = optimizers[name].get('param_groups', []) if name else []
    return Description(
        metadata=_metadata(state),
        shapes={plain_name(key): tuple(value.shape) for key, value in weights.items()},
        optimizer=name,
        trained=sum(len(group['params']) for group in groups) or None,
    )


# ------------------------------------------------------------------------------------------- shards


def _read_shards(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = {}
    planner = _Planner(keys={'state.model', 'state.integrations'})
    _load_state_dict(state, storage_reader=ShardReader(path), planner=planner, no_dist=True)
    return _section(state, 'state')


class _Planner(_EmptyStateDictLoadPlanner):
    """As torch's, which makes the tensors that it reads; but everything else has to be plain data."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Put one value in its place; it is not run."""
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], _load_plain(value))


def _load_plain(data: io.BytesIO) -> Any:
    with torch.serialization.safe_globals(_PLAIN):
        return torch.load(data, weights_only=True)


def _describe_shards(path: Path) -> Description:
    index = ShardReader(path).read_metadata()
    places = index.planner_data  # by name, the keys that lead to it
    stored: dict[str, Any] = {}
    for piece, where in index.storage_data.items():
        if isinstance(index.state_dict_metadata[piece.fqn], BytesStorageMetadata):
            with open(path / where.relative_path, 'rb') as file:
                file.seek(where.offset)
                set_element(stored, places[piece.fqn], _load_plain(io.BytesIO(file.read(where.length))))
    shapes = {
        plain_name('.'.join(map(str, places[name][2:]))): tuple(value.size)
        for name, value in index.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata) and tuple(places[name][:2]) == ('state', 'model')
    }
    optimizers = {keys[2] for keys in places.values() if tuple(keys[:2]) == ('state', 'optimizers') and len(keys) > 2}
    return Description(_metadata(_section(stored, 'state')), shapes, next(iter(optimizers), None), None)
