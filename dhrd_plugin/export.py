"""The slim classifier out of any Composer checkpoint of a run, full or sharded, also of one that was killed."""

import argparse
import datetime
import io
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import extract_path_from_symlink, get_file, maybe_create_object_store_from_uri, parse_uri
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.torch_version import TorchVersion

from dhrd_plugin.checkpoints import LATEST, ShardReader, find_flaw, reading
from dhrd_plugin.cli import run
from dhrd_plugin.errors import UserError
from dhrd_plugin.models.export import DTYPES, network_state, write_slim
from dhrd_plugin.models.onnx import check_onnx

# What Composer stores besides tensors and plain data; none of it runs anything when it is loaded.
_PLAIN = [
    np.ndarray,
    np.dtype,
    type(np.dtype('uint32')),
    np.empty(0).__reduce__()[0],
    datetime.timedelta,
    TorchVersion,
]


def export_checkpoint(
    checkpoint: str, out: str | Path, dtype: torch.dtype | None = None, onnx: bool = False
) -> Path:
    """Write the slim classifier that a checkpoint holds.

    Args:
        checkpoint: a ``.pt`` file, a folder of shards, ``latest-rank0.pt``, or the address of any of
            these in an object store.
        out: the folder to write; appears whole or not at all.
        dtype: of the weights. Default: as trained.
        onnx: write ``model.onnx`` besides.

    Returns:
        ``out``.

    Raises:
        UserError: the checkpoint is not whole, or not one of a model that can be exported.
    """
    metadata, state = read_checkpoint(checkpoint)
    return write_slim(metadata, state, out, dtype, onnx=onnx)


def read_checkpoint(checkpoint: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and network of a checkpoint; nothing in it is run.

    Args:
        checkpoint: as for :func:`export_checkpoint`.

    Returns:
        What :func:`~dhrd_plugin.models.export.write_slim` takes.

    Raises:
        UserError: it is not whole, or describes no model.
    """
    local = maybe_create_object_store_from_uri(checkpoint) is None
    with nullcontext() if local else tempfile.TemporaryDirectory() as folder:
        path = Path(checkpoint) if local else _download(checkpoint, Path(str(folder)))
        flaw = find_flaw(str(path))
        if flaw is not None:
            raise UserError(f'{checkpoint}: {flaw}; expected a whole checkpoint of Composer')
        stored = _read_shards(path) if path.is_dir() else _read_file(path)
    metadata = stored.get('integrations', {}).get('huggingface')
    if not metadata:
        raise UserError(f'{checkpoint}: it describes no model; expected the checkpoint of a HuggingFaceModel')
    return metadata, network_state(stored['model'])


def _download(address: str, folder: Path) -> Path:
    store = maybe_create_object_store_from_uri(address)
    name = parse_uri(address)[2]
    try:
        with reading(address):
            if name.split('/')[-1] == LATEST:
                name = extract_path_from_symlink(f'{name}.symlink', store)
            inside = [found for found in store.list_objects(f'{name}/') if not found.endswith('/')]  # pyright: ignore
            for found in inside or [name]:
                get_file(found, str(folder / found.split('/')[-1]), store, progress_bar=False)
    except FileNotFoundError:
        raise UserError(f'{address}: no such file; expected a whole checkpoint of Composer') from None
    return folder if inside else folder / name.split('/')[-1]


def _read_file(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(_PLAIN):
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)['state']


def _read_shards(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = {}
    planner = _Planner(keys={'state.model', 'state.integrations'})
    _load_state_dict(state, storage_reader=ShardReader(path), planner=planner, no_dist=True)
    return state['state']


class _Planner(_EmptyStateDictLoadPlanner):
    """As torch's, which makes the tensors that it reads; but what is no tensor has to be plain data."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Put one value in its place."""
        with torch.serialization.safe_globals(_PLAIN):
            plain = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)


def main(argv: Sequence[str] | None = None) -> int:
    """``export.py CHECKPOINT OUT``."""
    parser = argparse.ArgumentParser(description='Write the slim classifier that a Composer checkpoint holds.')
    parser.add_argument('checkpoint', help='a file, a folder of shards, or an address such as s3://bucket/run/ep1.pt')
    parser.add_argument('out', help='the folder to write')
    parser.add_argument('--dtype', choices=sorted(DTYPES), help='default: as trained')
    parser.add_argument('--onnx', action='store_true', help='write model.onnx besides')
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return run(lambda: _export(args))


def _export(args: argparse.Namespace) -> None:
    if args.onnx:
        check_onnx('--onnx')
    export_checkpoint(args.checkpoint, args.out, args.dtype and DTYPES[args.dtype], args.onnx)
    print(f'slim classifier: {args.out}')
