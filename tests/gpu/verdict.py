"""Comparisons of yamls/compare on one GPU: their cells by many processes that each start only once.

    python tests/gpu/verdict.py --sweep 150 --verdict 240 --workers 16 --out OUT [KEY=VALUE ...]
    python tests/gpu/verdict.py --sweep 0 --verdict 400 --plans verdict --out OUT

The first stage runs esnli_lr.yaml and chooses each arm's learning rate, that of the best mean over the seeds on the dev
rows; the second runs esnli.yaml with these. Other plans run as they are. OUT/NAME holds a comparison's plan and
results, which ``dhrd compare --report`` reads. Unlike there, exports are evaluated in TF32, and no picture of them is
drawn. Each comparison ends when its seconds are over; cells come one seed of all arms after another. What OUT holds
of a comparison is not run again, and refused where it was run with other settings. Overrides are those of
``dhrd compare``, for all of them; ``tasks.*`` stands for each task.
"""

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import queue
import shutil
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SWEEP, SWEPT = 'esnli_lr', 'esnli'
LIKE = 'label_first_0.3'  # whose learning rate the arms take that vary it
VARIED = 'label_first_0.01', 'shuffled_rationales_0.3', 'shuffled_tokens_0.3', 'one_rationale_0.3'


def main() -> None:
    """Both stages, or those that have seconds."""
    args = parse_args()
    context = multiprocessing.get_context('spawn')
    todo, done = context.Queue(), context.Queue()
    os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')  # of the workers
    workers = [context.Process(target=work, args=(todo, done, args.scratch, 29600 + i)) for i in range(args.workers)]
    for worker in workers:
        worker.start()
    try:
        overrides = list(args.overrides)
        if args.sweep:
            chosen = pick(run_stage(args, SWEEP, overrides, args.sweep, todo, done, workers))
            overrides += [f'arms.{arm}.optimizer.lr={rate}' for arm, rate in chosen.items()]
            overrides += [f'arms.{arm}.optimizer.lr={chosen[LIKE]}' for arm in VARIED if LIKE in chosen]
        for name in args.plans if args.verdict else ():
            run_stage(args, name, overrides if name == SWEPT else args.overrides, args.verdict, todo, done, workers)
    finally:
        for worker in workers:
            worker.kill()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument('overrides', nargs='*', help='key=value, of all comparisons')
    parser.add_argument('--sweep', type=float, default=150, metavar='S', help='seconds of the first stage; 0: none')
    parser.add_argument('--verdict', type=float, default=240, metavar='S', help='of each comparison; 0: none')
    parser.add_argument('--plans', nargs='+', default=[SWEPT], metavar='NAME', help='of yamls/compare; default: esnli')
    parser.add_argument('--workers', type=int, default=16)
    parser.add_argument('--out', type=Path, required=True, help='for plans and results')
    parser.add_argument('--scratch', type=Path, default=Path('/tmp/verdict'), help='for cells, which are removed')
    return parser.parse_intermixed_args()


def run_stage(args: Any, name: str, overrides: list[str], seconds: float, todo: Any, done: Any, workers: Any) -> Any:
    """Hand out the cells of a comparison, and keep what comes back until the time is over. Returns the comparison."""
    end = time.monotonic() + seconds
    from dhrd_plugin.comparison.cells import append, find_done
    from dhrd_plugin.comparison.plan import build_cells, load_comparison, write_plan
    from dhrd_plugin.comparison.results import RESULTS
    from dhrd_plugin.models.pretrained import resolve

    path = Path(os.path.relpath(ROOT), 'yamls', 'compare', f'{name}.yaml')  # it stands in the plan
    tasks = list(load_comparison(path).tasks)
    overrides = [found for override in overrides for found in spread(override, tasks)]
    comparison = load_comparison(path, [*overrides, f'output_dir={args.out / name}'])
    cells = build_cells(comparison, path)
    there = find_done(args.out / name / RESULTS, cells)
    write_plan(comparison)
    print(f'{name}: {" ".join(overrides)}; {len(there)} of {len(cells)} cells are there', flush=True)
    resolve(cells[0].config.model.pretrained_model_name_or_path)  # converts a package's weights: not in every worker
    keys = [cell.key for cell in cells if cell.key not in there]
    for key in keys:
        todo.put((name, str(path), overrides, key))
    left = set(keys)
    while left and (rest := end - time.monotonic()) > 0 and any(worker.is_alive() for worker in workers):
        try:
            stage, key, found, took = done.get(timeout=min(rest, 5))
        except queue.Empty:
            continue
        if isinstance(found, str):
            print(f'{stage} {" ".join(map(str, key))}: failed\n{found}', flush=True)
        else:
            append(args.out / stage / RESULTS, found)
            scores = ', '.join(f'{record["split"]} {score(record):.4f}' for record in found)
            took = ', '.join(f'{part} {value:.1f}' for part, value in took.items())
            print(f'{stage} {" ".join(map(str, key))}: {scores}; seconds: {took}', flush=True)
        if stage == name:  # or late, from the stage before
            left.discard(key)
    with contextlib.suppress(queue.Empty):
        while True:
            todo.get(timeout=0.5)
    print(
        f'{name}: {len(keys) - len(left)} of {len(keys)} cells in {seconds - end + time.monotonic():.0f} s', flush=True
    )
    whole = [s for s in comparison.seeds if not any(key[2] == s for key in left)]
    print(f'{name}: whole seeds: {whole}', flush=True)
    return comparison


def spread(override: str, tasks: list[str]) -> list[str]:
    """An override of ``tasks.*`` as one of each task."""
    return [override.replace('tasks.*', f'tasks.{task}') for task in tasks] if 'tasks.*' in override else [override]


def score(record: dict[str, Any]) -> float:
    """The score of a cell on an evaluation set, as in the report."""
    return statistics.mean(record['metrics'][name] for name in record['task_metrics'])


def pick(comparison: Any) -> dict[str, float]:
    """The learning rates that the arms are run with; prints how they were chosen."""
    from dhrd_plugin.comparison.results import read_results

    results = read_results(Path(comparison.output_dir))
    chosen = {}
    print('mean (lowest to highest, seeds) by learning rate')
    for arm in comparison.arms:
        found = {t: {s: score(r) for s, r in results.cells((t, 'dev'), arm).items()} for t in comparison.tasks}
        both = set.intersection(*map(set, found.values()))  # seeds that every rate has, if any: the same for all
        values = {t: [v for s, v in by_seed.items() if not both or s in both] for t, by_seed in found.items()}
        if not any(values.values()):
            continue
        best = max((t for t in values if values[t]), key=lambda t: statistics.mean(values[t]))
        chosen[arm] = comparison.tasks[best]['optimizer']['lr']
        told = [
            f'{t} {statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f}, {len(v)})' for t, v in values.items() if v
        ]
        print(f'{arm}: {"; ".join(told)}: {best}', flush=True)
    return chosen


# ---------------------------------------------------------------------------------- a worker


def work(todo: Any, done: Any, scratch: Path, port: int) -> None:
    """Run cells, one after another, in this process."""
    os.environ['MASTER_PORT'] = str(port)
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision('high')
    from transformers.utils import logging

    from dhrd_plugin import evaluate, ranks
    from dhrd_plugin.comparison import cells
    from dhrd_plugin.comparison.plan import EXPORT, build_cells, load_comparison

    ranks.end_with_parent()
    os.fsync = lambda _: None  # an export is read once and removed: it need not reach the disk
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    evaluate.draw = lambda *_: None
    while True:
        name, path, overrides, key = todo.get()
        start = time.monotonic()
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                comparison = load_comparison(path, [*overrides, f'output_dir={scratch / name}'], quiet=True)
                cell = build_cells(comparison, path, only=key)[0]
                shutil.rmtree(cell.folder, ignore_errors=True)
                cells.run_cell(cell)
                found: Any = cells.read_cell(cell)
                seconds = json.loads((cell.folder / cells.SUMMARY).read_text())['seconds']
                shutil.rmtree(cell.folder / EXPORT)
            took = {**seconds, 'all': time.monotonic() - start}
        except (Exception, SystemExit):
            found, took = f'{said.getvalue()[-2000:]}\n{traceback.format_exc()}', {}
        done.put((name, key, found, took))
        gc.collect()  # the trainer, which refers to itself
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == '__main__':
    from dhrd_plugin.cli import run

    sys.exit(run(main))
