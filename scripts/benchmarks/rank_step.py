"""Training steps on one or more ranks: ``composer -n 2 -m benchmarks.rank_step SPEC.json``."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.fits import fit
from benchmarks.material import build_classifier, load_backbone
from benchmarks.options import Options
from dhrd_plugin.data.collator import TripletCollator
from dhrd_plugin.data.data_spec import triplet_data_spec
from dhrd_plugin.data.tasks import load_task

SCRIPTS = Path(__file__).parents[1]  # the ranks import ``benchmarks`` from here
TIMEOUT = 300.0  # seconds


class LaunchFailed(Exception):
    """A launch that wrote no times; the message says why."""


def launch(ranks: int, spec: Mapping[str, Any], folder: Path, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Run :func:`main` on so many ranks of this machine, one thread each, by the ``composer`` command.

    Args:
        ranks: processes.
        spec: see :func:`main`, without ``output``.
        folder: for the files that are handed over.
        timeout: seconds. Default: 300.

    Returns:
        What rank 0 found; see :func:`main`.

    Raises:
        LaunchFailed: with the reason.
    """
    output, path = folder / 'steps.json', folder / 'spec.json'
    output.unlink(missing_ok=True)
    path.write_text(json.dumps({**spec, 'output': str(output)}), 'utf-8')
    command = [sys.executable, '-m', 'composer.cli', '-n', str(ranks), '-m', __name__, str(path)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive', 'TOKENIZERS_PARALLELISM': 'false'}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(SCRIPTS), env.get('PYTHONPATH')]))
    pipes: dict[str, Any] = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise LaunchFailed(f'not done after {timeout:g} s') from None
    finally:
        with suppress(ProcessLookupError):  # the launcher's ranks too
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode or not output.is_file():
        raise LaunchFailed(_reason(said, process.returncode))
    return json.loads(output.read_text('utf-8'))


def _reason(said: str, status: int) -> str:
    """The last error that was printed, on one line."""
    errors = re.findall(r'^(?:error|[\w.]*(?:Error|Exception)): .*', said, re.MULTILINE)
    return errors[-1] if errors else f'exit status {status}'


class Seen(Callback):
    """Count what this rank was given to run.

    Attributes:
        rows: of each step.
        tokens: real ones of each step.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.tokens: list[int] = []

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The loop has its batch."""
        self.rows.append(len(state.batch['labels']))
        self.tokens.append(int(state.batch['attention_mask'].sum()))


def main(path: str) -> None:
    """Train on this rank; rank 0 writes the result.

    Args:
        path: a JSON file with ``model`` (a folder or name), its ``layers`` (0: all), ``task`` (a name), ``rows`` (those
            of each rank in each step), ``steps`` and ``output``, the file to write: ``seconds`` of each step, and
            ``rows`` and ``tokens`` of each rank and step.
    """
    torch.set_num_threads(1)
    spec = json.loads(Path(path).read_text('utf-8'))
    dist.initialize_dist('gpu' if torch.cuda.is_available() else 'cpu')
    task = load_task(spec['task'])
    lm, tokenizer = load_backbone(Options(model=spec['model'], layers=spec['layers']))
    ranks, count = dist.get_world_size(), len(spec['rows'])
    rows = [row for _ in range(spec['steps']) for row in spec['rows'] for _ in range(ranks)]
    sampler = DistributedSampler(rows, ranks, dist.get_global_rank(), shuffle=False)  # pyright: ignore
    collate = TripletCollator(tokenizer, task.label_names)
    seen = Seen()
    data = triplet_data_spec(DataLoader(rows, count, sampler=sampler, collate_fn=collate))  # pyright: ignore
    clock = fit(build_classifier(lm, tokenizer, task), data, spec['steps'], count, [seen])
    found = dist.all_gather_object({'rows': seen.rows, 'tokens': seen.tokens})
    if dist.get_global_rank() == 0:
        result = {'seconds': clock.steps, **{key: [each[key] for each in found] for key in ('rows', 'tokens')}}
        Path(spec['output']).write_text(json.dumps(result), 'utf-8')


if __name__ == '__main__':
    main(sys.argv[1])
