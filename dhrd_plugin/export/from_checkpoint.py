"""Export the slim classifier from a Composer checkpoint, full or sharded, also of a run that was killed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dhrd_plugin.checkpoints.read import about, read_checkpoint
from dhrd_plugin.cli import Parser, run
from dhrd_plugin.errors import user_errors
from dhrd_plugin.export.onnx import KINDS, check_onnx
from dhrd_plugin.export.place import check_place
from dhrd_plugin.export.write import DTYPES, network_state, write_slim
from dhrd_plugin.streams.remote import is_remote


def export_checkpoint(
    checkpoint: str, out: str | Path, dtype: torch.dtype | None = None, onnx: bool | str | None = None
) -> Path:
    """Write the slim classifier that a checkpoint holds.

    Args:
        checkpoint: a ``.pt`` file, a folder of shards, ``latest-rank0.pt``, or the address of any of
            these in an object store.
        out: the folder to write; appears whole or not at all, and replaces an earlier export.
        dtype: of the weights. Default: as trained.
        onnx: ``True`` or ``'fp32'`` writes ``model.onnx`` besides, ``'int8'`` also ``model-int8.onnx``. Default: none.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` is taken by something else, or cannot be written; the checkpoint is not whole, or its
            model cannot be exported.
    """
    check_place(out, apart={'the checkpoint': None if is_remote(checkpoint) else checkpoint})
    metadata, state = read_checkpoint(checkpoint)
    with about(checkpoint), user_errors('cannot be exported'):
        return write_slim(metadata, network_state(state), out, dtype, onnx=onnx)


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd export CHECKPOINT OUT``; returns the exit status."""
    return run(lambda: _export(_parse_args(sys.argv[1:] if argv is None else argv)))


def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog='dhrd export', description='Write the slim classifier that a Composer checkpoint holds.')
    parser.add_argument('checkpoint', help='a file, a folder of shards, or an address such as s3://bucket/run/ep1.pt')
    parser.add_argument('out', help='the folder to write')
    parser.add_argument('--dtype', choices=sorted(DTYPES), help='default: as trained')
    parser.add_argument(
        '--onnx', nargs='?', const='fp32', choices=KINDS, help='write model.onnx besides; int8: and model-int8.onnx'
    )
    return parser.parse_args(_with_kind(argv))


def _with_kind(argv: Sequence[str]) -> list[str]:
    """``--onnx`` alone is fp32, also before a checkpoint, which argparse would take for its kind."""
    after = [*argv[1:], '']
    return [f'{word}=fp32' if word == '--onnx' and then not in KINDS else word for word, then in zip(argv, after)]


def _export(args: argparse.Namespace) -> None:
    check_onnx('--onnx', args.onnx)
    export_checkpoint(args.checkpoint, args.out, args.dtype and DTYPES[args.dtype], args.onnx)
    print(f'slim classifier: {args.out}')
