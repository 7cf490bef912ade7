"""How fast everything is, side by side with how it could be done otherwise; each figure is a ratio of one run."""

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dhrd_plugin.benchmarks.options import Options
from dhrd_plugin.cli import run
from dhrd_plugin.files import write_json

VERBS = ('train', 'infer', 'data', 'scale')


def main(argv: Sequence[str] | None = None) -> int:
    """``benchmark.py infer [--model NAME] ...``."""
    parser = argparse.ArgumentParser(description='Measure, and print a table of what was promised and what is.')
    parser.add_argument('verb', choices=VERBS)
    parser.add_argument('--model', default=Options.model, help='a folder, a hub id or package:NAME; %(default)s')
    parser.add_argument('--output', type=Path, help='write the report as JSON, too')
    whole = {'type': _count, 'default': 0}
    parser.add_argument('--layers', **whole, help="only the backbone's first layers; default: all")
    parser.add_argument('--rows', **whole, help="rows to measure on, scale: of the largest set; "
                        "default: the benchmark's own number")  # fmt: skip
    parser.add_argument('--repetitions', **whole, help="of each measurement; default: the benchmark's own number")
    parser.add_argument('--threads', **whole, help='default: as torch, tokenizers and ONNX Runtime choose')
    parser.add_argument('--new-tokens', type=_count, default=Options.new_tokens,
                        help='infer: of chain-of-thought decoding; default: %(default)s, the paper')  # fmt: skip
    parser.add_argument('--s3', default='', help='data: an address to put shards under, such as s3://bucket/prefix; '
                        'S3_ENDPOINT_URL names another server than Amazon; default: S3 is not measured')  # fmt: skip
    args = vars(parser.parse_args(argv))
    verb, output = args.pop('verb'), args.pop('output')
    return run(lambda: _benchmark(verb, Options(**args), output))


def _benchmark(verb: str, options: Options, output: Path | None) -> None:
    if options.threads:  # before anything reads them
        for name in ('OMP_NUM_THREADS', 'RAYON_NUM_THREADS'):
            os.environ[name] = str(options.threads)
    import torch

    from dhrd_plugin.benchmarks.table import render

    if options.threads:
        torch.set_num_threads(options.threads)
    report = import_module(f'dhrd_plugin.benchmarks.{verb}').run(options)
    if output:
        write_json(output, report)
    print(render(report))


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'{text} is not a whole number from 0')
    return value
