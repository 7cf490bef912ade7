"""How fast everything is, side by side with how it could be done otherwise; each figure is a ratio within one run."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.options import Options
from dhrd_plugin.cli import Parser, number, run
from dhrd_plugin.files import check_file, has_keys, write_json

VERBS = ('train', 'infer', 'data', 'scale')


def main(argv: Sequence[str] | None = None) -> int:
    """``benchmark.py infer [--model NAME] ...``.

    Args:
        argv: the arguments. Default: those of the command line.

    Returns:
        The exit status; see :func:`~dhrd_plugin.cli.run`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ['gpu']:  # its sections have options of their own
        return import_module('benchmarks.gpu').main(argv[1:])
    return run(lambda: _benchmark(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog='benchmark.py',
        description='Measure, and print a table of what was promised and what is.',
        epilog='`benchmark.py gpu --help`: what needs a GPU',
    )
    parser.add_argument('verb', choices=VERBS)
    parser.add_argument('--model', default=Options.model, help='folder, hub id or package:NAME; default: %(default)s')
    parser.add_argument('--output', type=Path, help='also write the report as JSON')
    whole = {'type': number(int, 0), 'default': 0}
    parser.add_argument('--layers', **whole, help="keep only the backbone's first layers; default: all")
    parser.add_argument(
        '--rows', **whole, help="rows to measure on, scale: of the largest set; default: the benchmark's own number"
    )
    parser.add_argument('--repetitions', **whole, help="of each measurement; default: the benchmark's own number")
    parser.add_argument('--threads', **whole, help='default: as torch, tokenizers and ONNX Runtime choose')
    parser.add_argument(
        '--new-tokens',
        type=number(int, 0),
        default=Options.new_tokens,
        help='infer: of chain-of-thought decoding; default: %(default)s, the paper',
    )
    parser.add_argument(
        '--s3',
        default='',
        help='data: an address to put shards under, such as s3://bucket/prefix; '
        "S3_ENDPOINT_URL names a server other than Amazon's; default: S3 is not measured",
    )
    return parser.parse_args(argv)


def _benchmark(args: argparse.Namespace) -> None:
    given = vars(args)
    verb, output = given.pop('verb'), given.pop('output')
    if output:
        check_file(output, '--output', 'a report of a benchmark', lambda path: has_keys(path, 'benchmark', 'machine'))
    options = Options(**given)
    if options.threads:  # before anything reads them
        for name in ('OMP_NUM_THREADS', 'RAYON_NUM_THREADS'):
            os.environ[name] = str(options.threads)
    import torch

    from benchmarks.table import render

    if options.threads:
        torch.set_num_threads(options.threads)
    report = import_module(f'benchmarks.{verb}').run(options)
    if output:
        write_json(output, report)
    print(render(report))
