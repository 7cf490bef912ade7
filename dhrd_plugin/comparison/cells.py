"""Does distillation help, and how surely: arms x tasks x seeds, each cell a training run in a process of its own."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from composer.utils import dist
from transformers.utils import logging

from dhrd_plugin import ranks
from dhrd_plugin.checkpoints.lock import LOCK, held
from dhrd_plugin.cli import Parser, number, run
from dhrd_plugin.comparison.page import check_extra, write_report
from dhrd_plugin.comparison.plan import (
    EXPORT,
    Cell,
    Comparison,
    build_cells,
    check_plan,
    check_targets,
    load_comparison,
    write_plan,
)
from dhrd_plugin.comparison.results import RESULTS, CellKey, read_lines
from dhrd_plugin.data.tasks import load_task
from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.evaluate import report_on
from dhrd_plugin.files import json_line, write_bytes
from dhrd_plugin.training.checks import check_limits
from dhrd_plugin.training.config import used
from dhrd_plugin.training.run import train
from dhrd_plugin.training.summary import say

SUMMARY, EVALUATION, OUTPUT, FINGERPRINT = 'summary.json', 'evaluation', 'output.txt', 'fingerprint'  # of a cell
VERSIONS = ('dhrd-plugin', 'torch', 'transformers', 'mosaicml')
POLL = 0.1  # seconds between two looks at the cells that run
GRACE = 60.0  # seconds that a cell has to save a checkpoint in and end


def compare(path: str | Path, overrides: Sequence[str] = (), jobs: int = 1) -> Path:
    """Run every cell that has no result yet. On several ranks each of them calls it, and starts its share of a cell.

    A result is added to ``results.jsonl`` when its cell has ended, so that a comparison that was killed goes
    on with the cells at which it was.

    Args:
        path: a comparison's YAML.
        overrides: ``key.sub=value``, as on the command line.
        jobs: cells side by side. Default: 1.

    Returns:
        ``results.jsonl``: a line for each cell and evaluation set.
    """
    if jobs > 1 and ranks.world_size() > 1:
        raise UserError(f'--jobs: found {jobs} on {ranks.world_size()} ranks; expected 1, as ranks share a cell')
    check_extra()
    comparison = load_comparison(path, overrides)
    cells = build_cells(comparison, path)
    for cell in cells:
        check_limits(cell.config)
        if load_task(cell.config.task).multi_label:
            raise UserError(f'{path}: tasks.{cell.task}: found several labels to a row; expected one, right or wrong')
    results = Path(comparison.output_dir) / RESULTS
    done = find_done(results, cells)
    if ranks.rank() == 0:
        check_targets(comparison, [cell for cell in cells if cell.key not in done], path)
    with held(Path(comparison.output_dir) / LOCK, 'output_dir') if ranks.rank() == 0 else nullcontext():
        command = [sys.executable, '-m', 'dhrd_plugin', 'compare', str(path), *overrides]
        _compare(comparison, cells, results, command, jobs)
    return results


def _compare(comparison: Comparison, cells: Sequence[Cell], results: Path, command: Sequence[str], jobs: int) -> None:
    """Run what is missing, while no other comparison writes there: one that has just ended may have."""
    done = find_done(results, cells)
    missing = [(f'cell {i} of {len(cells)}: {cell}', cell) for i, cell in enumerate(cells, 1) if cell.key not in done]

    def keep(cell: Cell) -> None:
        if ranks.rank() == 0:
            append(results, read_cell(cell))
            if not comparison.keep_exports:
                shutil.rmtree(cell.folder / EXPORT)

    with user_errors(results.parent, OSError):
        if ranks.rank() == 0:
            write_plan(comparison)
        say(f'{comparison.name}: {len(cells)} cells, {len(done)} of them in {results}')
        _run_cells(missing, command, jobs, keep)


def find_done(path: Path, cells: Sequence[Cell]) -> set[CellKey]:
    """The cells that have results; refuses those of another config, or of other data where both are known."""
    planned = {cell.key: cell for cell in cells}
    done = set()
    for record in read_lines(path):
        cell = planned.get((record['task'], record['arm'], record['seed']))
        if cell is None:
            continue
        what = 'with other settings than it has' if record['fingerprint'] != cell.fingerprint else ''
        if not what and (data := record.get('data')) and cell.data and data != cell.data:
            what = 'on other rows, rationales or template than there are'
        if what:
            raise UserError(f'{path}: {cell} was run {what} now; expected the same, or another output_dir')
        done.add(cell.key)
    return done


def append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to a ``results.jsonl``, in one step."""
    lines = b''.join(map(json_line, records))
    write_bytes(path, (path.read_bytes() if path.exists() else b'') + lines)


# ------------------------------------------------------------------------------------- processes


def _run_cells(
    cells: Sequence[tuple[str, Cell]], command: Sequence[str], jobs: int, keep: Callable[[Cell], None]
) -> None:
    """Run cells, so many side by side, and ``keep`` each that has ended; whatever happens, none goes on after this."""
    waiting, running = list(cells), list[tuple[str, Cell, subprocess.Popen]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                title, cell = waiting.pop(0)
                say(f'--- {title}{"" if jobs == 1 else f": begins, see {cell.folder / OUTPUT}"}')
                running.append((title, cell, _start(cell, command, jobs)))
            time.sleep(POLL)
            for ended in [entry for entry in running if entry[2].poll() is not None]:
                running.remove(ended)
                title, cell, process = ended
                if process.returncode:
                    raise UserError(_failure(cell, process.returncode, jobs))
                keep(cell)
                if jobs > 1:
                    say(f'--- {title}: done')
    finally:  # also after Ctrl-C or a SIGTERM, which Composer turns into a SystemExit
        for *_, process in running:
            process.terminate()
        for *_, process in running:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Wait for a process that was told to end, and kill it where it does not.

    Python loses what a signal raises in a ``__del__``, and may wait at its own end for a thread that has none.
    """
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _start(cell: Cell, command: Sequence[str], jobs: int) -> subprocess.Popen:
    """A cell as a process. On several ranks those of the others wait for rank 0's before they write anything."""
    command = [*command, '--cell', *map(str, cell.key), cell.fingerprint, str(os.getpid())]
    if ranks.rank() == 0:
        _clear(cell)
    if jobs == 1:
        return subprocess.Popen(command)
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / OUTPUT, 'ab') as output:
        return subprocess.Popen(
            command,
            env={'OMP_NUM_THREADS': threads, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _clear(cell: Cell) -> None:
    """Remove what a killed run left, but for the checkpoints of the very same cell where it is to go on from them."""
    note, same = cell.folder / FINGERPRINT, f'{cell.fingerprint} {cell.data}'
    if not (cell.config.autoresume and note.exists() and note.read_text(encoding='utf-8') == same):
        shutil.rmtree(cell.folder, ignore_errors=True)
    write_bytes(note, same.encode())


def _failure(cell: Cell, status: int, jobs: int) -> str:
    how = f'exit status {status}' if status > 0 else f'ended by {signal.Signals(-status).name}'
    return f'{cell}: {how}; {"its own words stand above" if jobs == 1 else f"see {cell.folder / OUTPUT}"}'


def run_cell(cell: Cell) -> None:
    """Train a cell and evaluate its export on every evaluation set. Every rank calls it.

    Args:
        cell: one of :func:`~dhrd_plugin.comparison.plan.build_cells`.
    """
    train(cell.config)
    dist.barrier()  # the summary is there
    places = _read_json(cell.folder / SUMMARY)['data']
    for label in used(cell.config.eval_loaders):
        rows, output = places[f'eval_loaders.{label}'], cell.folder / EVALUATION / label
        report_on(cell.folder / EXPORT, rows, output=output, batch_size=cell.config.device_eval_batch_size)
    dist.barrier()  # the next cell meets at the same port


def _run_one(path: str, overrides: Sequence[str], cell: Sequence[str]) -> None:
    """The command's own process of a cell: its task, arm, seed and fingerprint, and the process that started it."""
    task, arm, seed, fingerprint, parent = cell
    ranks.end_with_parent(signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before this one could ask to be told
        return
    found = build_cells(load_comparison(path, overrides, quiet=True), path, only=(task, arm, int(seed)))
    if not found or found[0].fingerprint != fingerprint:
        raise UserError(
            f'{path}: {task} {arm} seed {seed}: changed since the comparison began; start the command again'
        )
    run_cell(found[0])


# --------------------------------------------------------------------------------------- results


def read_cell(cell: Cell) -> list[dict[str, Any]]:
    """What a cell that has ended adds to ``results.jsonl``.

    Args:
        cell: one of :func:`~dhrd_plugin.comparison.plan.build_cells`.

    Returns:
        A record for each evaluation set, made of the cell's summary and evaluations.
    """
    summary = _read_json(cell.folder / SUMMARY)
    method = used(cell.config.algorithms).get('auxiliary_reasoning_loss')
    ran = {
        'task': cell.task,
        'arm': cell.arm,
        'seed': cell.seed,
        'fingerprint': cell.fingerprint,
        'data': cell.data,
        'model': cell.config.model.pretrained_model_name_or_path,
        'alpha': None if method is None else method.get('alpha', 1.0),
        'beta': 1.0 if method is None else method.get('beta', 1.0),
        'schedule': method and method.get('schedule'),
        'control': cell.config.train_loader.control,
        **{name: summary[name] for name in ('steps', 'rows', 'tokens', 'seconds_per_step', 'world_size', 'series')},
        'finished': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'versions': {name: summary['versions'][name] for name in VERSIONS},
    }
    folders = {label: cell.folder / EVALUATION / label for label in used(cell.config.eval_loaders)}
    return [{**ran, 'split': label, **_read_evaluation(folder)} for label, folder in folders.items()]


def _read_evaluation(folder: Path) -> dict[str, Any]:
    report = _read_json(folder / 'report.json')
    lines = (folder / 'predictions.jsonl').read_text(encoding='utf-8').split('\n')
    rows = [json.loads(line) for line in lines if line]
    names = report['label_names']
    return {
        'metrics': report['metrics'],
        'task_metrics': report['task_metrics'],
        'label_names': names,
        'ids': [row['id'] for row in rows],
        'groups': [row['group'] for row in rows],
        'labels': [names.index(row['label']) for row in rows],
        'predictions': [names.index(row['prediction']) for row in rows],
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8'))


# ----------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """``dhrd compare YAML [key=value ...]``."""
    return run(lambda: _run(parse_args(argv)))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--cell`` is how a comparison starts one of its own."""
    parser = Parser(prog='dhrd compare', description='Train every arm on every task with every seed, and report.')
    parser.add_argument('yaml', help='a comparison, such as yamls/compare/superglue.yaml')
    parser.add_argument('overrides', nargs='*', help='key=value')
    parser.add_argument('--jobs', type=number(int, 1), default=1, metavar='N', help='cells side by side; default: 1')
    parser.add_argument('--report', action='store_true', help='only write the report of the cells that are there')
    parser.add_argument('--cell', nargs=5, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)  # overrides may stand on either side of an option


def _run(args: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    if args.cell:
        return _run_one(args.yaml, args.overrides, args.cell)
    if args.report:
        comparison = load_comparison(args.yaml, args.overrides)
        check_plan(comparison, args.yaml)
        folder = Path(comparison.output_dir)
        find_done(folder / RESULTS, build_cells(comparison, args.yaml))
    else:
        folder = compare(args.yaml, args.overrides, args.jobs).parent
    if ranks.rank() == 0:
        for path in write_report(folder):
            print(f'report: {path}')
