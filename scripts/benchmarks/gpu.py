"""What only a GPU can show: the sections of ``tests/gpu``, each in a process and a time of its own, and their table."""

import faulthandler
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.table import spell
from dhrd_plugin.cli import Parser, number, run
from dhrd_plugin.errors import UserError, nearest, user_errors

TESTS = Path(__file__).resolve().parents[2] / 'tests'
# NVML is asked whether there is a GPU: a process that asked CUDA itself cannot be forked.
ENVIRONMENT = {'PYTORCH_NVML_BASED_CUDA_CHECK': '1', 'HF_HUB_OFFLINE': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
THREADS = 4  # of each of the sections that run at once

Line = Mapping[str, Any]
# section: what it shows, in the form of llm-foundry's tables.
SPEED = ('speed', 'shapes', 'compiled')
COLUMNS = ('Model', 'Precision', 'Trained', 'Way', 'Rows', 'ms a step', 'Rows/s', 'Real tokens/s', 'MFU', 'Peak MiB')


def main(argv: Sequence[str] | None = None) -> int:
    """``benchmark.py gpu [--only NAME,...] [--seconds N] [--output FILE] [--table FILE]``."""
    return run(lambda: _main(_parser().parse_args(argv)))


def _parser() -> Parser:
    parser = Parser(prog='benchmark.py gpu', description='Run what needs a GPU, and print its table.')
    parser.add_argument('--only', default='', help='sections, by commas; default: all, in the order of their worth')
    parser.add_argument('--seconds', type=number(float, 1), default=900.0, help='in all; default: %(default)s')
    parser.add_argument('--output', type=Path, default=Path('results.jsonl'), help='lines are added; %(default)s')
    parser.add_argument('--table', type=Path, help='run nothing: the table of such a file')
    parser.add_argument('--section', help='run this section alone, in this process')
    return parser


def _main(args: Any) -> int:
    if args.table:
        print(table(read(args.table)))
        return 0
    end = time.time() + args.seconds
    os.environ.update(ENVIRONMENT)
    warnings.simplefilter('ignore')
    sys.path[:0] = [str(TESTS)]
    common, sections = import_module('gpu.common'), import_module('gpu.sections')
    common.OUTPUT['path'] = args.output.resolve()
    asked = [args.section] if args.section else [name for name in args.only.split(',') if name]
    for name in asked:  # before anything is run
        if name not in common.SECTIONS:
            raise UserError(f'--only: found no section {name!r}; {nearest(name, sections.ORDER)}')
    if args.section:
        return _section(common, args.section, common.SECTIONS[args.section][1])
    os.environ[common.RUN] = f'{datetime.now(timezone.utc).isoformat()} {os.getpid()}'
    failed = 0
    chosen = asked or list(sections.ORDER)
    for _, names in groupby(enumerate(chosen), lambda item: item[0] if common.SECTIONS[item[1]][2] else -1):
        failed += _together(common, [name for _, name in names], end, args)
    print(table(read(args.output)))
    return int(failed > 0)


def _together(common: Any, names: Sequence[str], end: float, args: Any) -> int:
    """Run sections at once, each in a process of its own, until its limit or the end of all; how many failed."""
    begun, failed = {}, 0
    for name in names:
        if end - time.time() < 5:
            common.emit('section', name=name, error='no time left')
            failed += 1
            continue
        limit = min(common.SECTIONS[name][1] * (5 if common.TINY else 1), end - time.time())
        begun[_fork(common, name, limit, args, len(names))] = name, time.time(), time.time() + limit
    while begun:
        for pid, (name, start, last) in list(begun.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            late = not found and time.time() > last
            if late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if not found and not late:
                continue
            with suppress(ProcessLookupError):  # what it leaves behind
                os.killpg(pid, signal.SIGKILL)
            del begun[pid]
            how = {'error': f'killed after {time.time() - start:.0f} s'}
            how = how if late else {'status': os.waitstatus_to_exitcode(status)}
            common.emit('section', name=name, seconds=round(time.time() - start, 1), **how)
            failed += late or status != 0
        time.sleep(0.05)
    return failed


def _fork(common: Any, name: str, limit: float, args: Any, many: int) -> int:
    """Begin a section in a process that has the imports behind it; its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        if common.torch.cuda._is_in_bad_fork():  # something that was imported has touched CUDA
            words = [sys.argv[0], 'gpu', '--section', name, '--output', str(args.output)]
            os.execv(sys.executable, [sys.executable, *words])
        if many > 1:
            os.environ['OMP_NUM_THREADS'] = str(THREADS)
            common.torch.set_num_threads(min(THREADS, len(os.sched_getaffinity(0))))
        status = _section(common, name, limit)
    finally:
        sys.stdout.flush()
        os._exit(status)


def _section(common: Any, name: str, limit: float) -> int:
    faulthandler.dump_traceback_later(max(1.0, limit - 1))  # where it stood when it was killed
    try:
        with common.told(name, section_ended='early'):
            common.SECTIONS[name][0]()
            return 0
    except BaseException as error:
        common.emit(name, error=f'{type(error).__name__}: {error}'[:300])
    return 1


# --------------------------------------------------------------------------------------- table


def read(path: Path) -> list[Line]:
    """Read the lines of the last run in a file; one that was being written when the machine went is left out."""
    found: list[Line] = []
    with user_errors(path, OSError):
        for text in path.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(text))
    return [line for line in found if line.get('run') == found[-1].get('run')]


def table(lines: Sequence[Line]) -> str:
    """Make a Markdown page of the lines: the machine, the steps in llm-foundry's form, and all other lines by section.

    Args:
        lines: of :func:`read`.

    Returns:
        Markdown.
    """
    parts = [_machine(lines)]
    steps = [line for line in lines if line['section'] in SPEED and 'ms' in line]
    if steps:
        parts.append(tabulate([_step(line) for line in steps], COLUMNS, tablefmt='github', disable_numparse=True))
    parts.append(tabulate(bars(lines), ('What', 'Bar', 'Found', 'Met'), tablefmt='github', disable_numparse=True))
    others = [line for line in lines if line not in steps and line['section'] not in ('env', 'section')]
    for name, found in groupby(sorted(others, key=lambda line: line['section']), lambda line: line['section']):
        parts.append(f'### {name}\n\n' + '\n'.join(_plain(list(found))))
    ended = [_ended(line) for line in lines if line['section'] == 'section']
    return '\n\n'.join([*parts, 'Sections: ' + ', '.join(ended)])


def _ended(line: Line) -> str:
    status = line.get('status', 0)
    how = line.get('error') or (f'exit status {status}' if status else '')
    return f'{line["name"]} {line.get("seconds", 0)} s' + (f' (**{how}**)' if how else '')


def bars(lines: Sequence[Line]) -> list[list[str]]:
    """What was promised: its name, its bar, what was found (empty where nothing was), and whether it is met."""
    # Of speeds the best, as the YAML can choose the way; of what should be little the worst.
    fast = {'speed': {'trained': 'whole', 'reasoning': True}, 'shapes': {'trained': 'whole'}}

    def best(section: str, key: str, of: Any = max, **given: Any) -> float | None:
        given = {**fast.get(section, {}), **given}
        found = [line for line in lines if line['section'] == section and line.get(key) is not None]
        return of((line[key] for line in found if all(line.get(k) == v for k, v in given.items())), default=None)

    def divided(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    one, padded = (best('speed', 'rows_s', way=way, rows=64) for way in ('one kernel', 'padded'))
    loss = {'section': 'loss_memory', 'key': 'of_full', 'of': min}  # of the best chunk size
    found = [
        ('135M, whole, bf16: MFU of real tokens', 0.25, best('speed', 'mfu'), True),
        ('1B: MFU', 0.40, best('shapes', 'mfu', model='1B'), True),
        ('8B: MFU', 0.45, best('shapes', 'mfu', model='8B'), True),
        ('padding_free against padded, 64 rows: rows a second', 1.8, divided(one, padded), True),
        (
            'memory of the reasoning loss against full logits, LM head frozen',
            0.1,
            best(**loss, head_trained=False),
            False,
        ),
        ('the same, LM head trained (its gradient counted in both)', 0.1, best(**loss, head_trained=True), False),
        ('predict, 230 tokens: rows a second', 3000, best('predict', 'rows_s', way='dhrd predict'), True),
        ('predict against chain of thought', 142, best('chain_of_thought', 'ratio'), True),
        ("Composer's loop against a bare loop", 1.05, best('composer_loop', 'ratio'), False),
        ('waits of ours in a step', 0, best('syncs', 'ours'), False),
        ('labels of an export that differ from the live model in fp32', 0, best('export', 'labels_export_live'), False),
    ]
    return [
        [
            what,
            f'at {"least" if more else "most"} {bar:g}',
            spell(value),
            '' if value is None else _met(value, bar, more),
        ]
        for what, bar, value, more in found
    ]


def _met(value: float, bar: float, more: bool) -> str:
    return 'yes' if (value >= bar if more else value <= bar) else 'no'


def _machine(lines: Sequence[Line]) -> str:
    about: dict[str, Any] = {}
    for line in lines:
        if line['section'] == 'env':
            about |= line
    gpu = about.get('gpu') or {}
    versions = ', '.join(f'{name} {version}' for name, version in about.get('versions', {}).items())
    ceilings = ', '.join(f'{key} {about[key]:.3g}' for key in ('bf16_tflops', 'copy_tb_s') if key in about)
    return f'**gpu** on {gpu.get("name", "a CPU")}, {about.get("cores")} cores ({ceilings}); {versions}'


def _step(line: Line) -> list[str]:
    way = line['way'] + ('' if line.get('reasoning', True) else ', no reasoning loss')
    mfu = f'{100 * line["mfu"]:.1f} %' if 'mfu' in line else ''
    numbers = [spell(line.get(key)) for key in ('rows', 'ms', 'rows_s', 'tokens_s')]
    return [line['model'], line['precision'], line['trained'], way, *numbers, mfu, spell(line.get('peak_mib'))]


def _plain(lines: Sequence[Line]) -> Iterator[str]:
    """One table of lines of the same keys after the other."""
    for keys, found in groupby(
        lines, lambda line: [key for key in line if key not in ('section', 'run', 'where', 'losses')]
    ):
        cells = [[spell(line[key]) for key in keys] for line in found]
        yield tabulate(cells, keys, tablefmt='github', disable_numparse=True) + '\n'
